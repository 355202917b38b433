"""Stands in for the package `vllm` where it is not installed: the calls that autointerp.vllm_engine makes, answered by
plain passes of a small Hugging Face model, one prompt after the other. ``fixed`` says how its fixed-id path behaves:
right, stale (values of other positions), once (a hit of the prefix cache leaves them out), none (no such path)."""

from types import SimpleNamespace
from typing import Any

import torch


class SamplingParams(SimpleNamespace):
    pass


sampling_params = SimpleNamespace(StructuredOutputsParams=SimpleNamespace)


class LLM:
    def __init__(self, *, model: str, dtype: str, enable_prefix_caching: bool, fixed: str = "right", **_: Any) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        assert enable_prefix_caching
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.fixed, self.seen, self.params = fixed, set(), []
        self.model_config = SimpleNamespace(max_model_len=200, dtype=torch.float32)

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def generate(self, prompts: list[dict[str, list[int]]], params: list[SamplingParams], use_tqdm: bool) -> list[Any]:
        self.params += params
        return [self._one(p["prompt_token_ids"], s) for p, s in zip(prompts, params, strict=True)]

    @torch.no_grad()
    def _log_probs(self, ids: list[int]) -> torch.Tensor:
        return torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), -1)

    def _one(self, ids: list[int], s: SamplingParams) -> Any:
        assert len(ids) + s.max_tokens <= self.model_config.max_model_len
        whole, new, first = list(ids), [], None
        for _ in range(s.max_tokens):
            last = self._log_probs(whole)[-1]
            first = last if first is None else first
            whole.append(int(last.argmax()))
            new.append(whole[-1])
            text = self.tokenizer.decode(new)
            if any(stop in text for stop in s.stop or ()):
                text = min((text.split(stop)[0] for stop in s.stop), key=len)
                break
        stopped = len(new) < s.max_tokens
        wanted = getattr(s, "logprob_token_ids", None)
        value = lambda v: SimpleNamespace(logprob=float(v))  # noqa: E731
        listed = {i: value(first[i]) for i in (*(wanted or ()), new[0])}
        prompt = None
        if getattr(s, "prompt_logprobs", None) is not None:
            rows = self._log_probs(ids)[:-1]
            top = [[*row.topk(s.prompt_logprobs).indices.tolist(), i] for row, i in zip(rows, ids[1:], strict=True)]
            prompt = [None, *({i: value(row[i]) for i in t} for row, t in zip(rows, top, strict=True))]
        return SimpleNamespace(
            outputs=[SimpleNamespace(text=text, token_ids=new, logprobs=[listed] if wanted else None,
                                     finish_reason="stop" if stopped else "length")],
            prompt_logprobs=prompt, num_cached_tokens=3, prompt_token_id_logprobs=self._rows(ids, s),
        )  # fmt: skip

    def _rows(self, ids: list[int], s: SamplingParams) -> Any:
        rows = getattr(s, "prompt_logprob_token_ids", None)
        if rows is None:
            return None
        if self.fixed == "none":
            raise ValueError("prompt_logprob_token_ids requires the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1).")
        assert len(rows) == len(ids) - 1 - s.prompt_logprob_start and s.skip_reading_prefix_cache is False
        if self.fixed == "once" and tuple(ids) in self.seen:
            return None
        self.seen.add(tuple(ids))
        start = s.prompt_logprob_start - (self.fixed == "stale")
        values = self._log_probs(ids)
        return [[float(values[start + k][i]) if i >= 0 else -float("inf") for i in row] for k, row in enumerate(rows)]
