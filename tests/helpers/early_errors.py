"""Settings that must be refused before any weight is read."""

from . import tiny

EARLY_ERRORS = [
    ({"targets": ["query"]}, r"targets: 'query' matches no layer"),
    ({"rank": 32}, r"rank=32 must be smaller"),
    ({"sparsity": "2:5"}, r"do not divide into the groups"),
    ({"num_samples": 5}, r"calibration=.* has 4 samples.*num_samples=5"),
    ({"calibration": ["too short"]}, r"calibration=.* tokens.*pass more text"),
    ({"calibration": [[{"role": "user", "content": "hi"}]]}, r"tokens.*pass more text"),
    ({"calibration": tiny.IDS + 4096}, r"outside \[0, vocab_size=4096\)"),
    ({"calibration": "file:*.absent"}, r"matches no file"),
    ({"calibration": "custom"}, r"pass the data again"),
]
