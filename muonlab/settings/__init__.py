"""What a user may set: a dataclass per section, checked whole before torch is imported.

`check` reads types, ranges and choices from annotations; `model`, `optimizer`, `schedule` and `data` have a dataclass
for each family, which `conf/` mirrors. Nothing here imports torch, and everything else may import this.
"""
