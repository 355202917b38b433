"""Texts that try to become markup, hide, reorder, or cannot be written."""

NASTY = {
    "markup": "<script>alert(1)</script>",
    "attribute": '" onmouseover="alert(1)',
    "entity": "&lt;b&gt;",
    "close": "</p></main>",
    "control": "a\x00b\x07c\x1b[31m",
    "lines": "one\ntwo\r\n\tthree\u2028",
    "hebrew": "שלום עולם",
    "arabic": "مرحبا",
    "override": "abc\u202edef\u2066x\u2069",
    "half": "\ud83d",
    "emoji": "👩\u200d💻",
    "template": "{{ 7*7 }}{% raw %}",
}
