"""What forward hooks do with the hidden states of a foreign module: find them, replace them. D width."""

from typing import Any

from torch import Tensor


def first_tensor(output: Any) -> Any:
    """The hidden states of a module's output: blocks return a tensor or a tuple that starts with it."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def with_first(output: Any, value: Tensor) -> Any:
    """``output`` with its hidden states replaced."""
    if isinstance(output, (tuple, list)):
        return type(output)([value, *output[1:]])
    return value


def replace_input(value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Arguments of a block call with its hidden states replaced, however they were passed."""
    if args:
        return (value, *args[1:]), kwargs
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return args, {**kwargs, name: value}
