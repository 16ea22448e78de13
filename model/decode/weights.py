from contextlib import contextmanager
from model.quant import kept_dequantized
@contextmanager
def kept_for_decoding(stage):
    with kept_dequantized(stage):
        yield
