"""stub"""
def rotate(x, cos, sin, **kw): raise NotImplementedError
