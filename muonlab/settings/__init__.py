"""What a user may set: one dataclass per section, checked completely before torch is imported.

`check` reads types, ranges and choices from annotations; `model`, `optimizer`, `schedule` and `data` have one
per family, which `conf/` mirrors. Nothing here imports torch, and every package may import this one.
"""
