def apply_rotary(*a, **k): raise NotImplementedError
