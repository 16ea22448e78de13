"""Operations with a backward pass by hand: norms, SwiGLU, the gated delta rule, the loss."""
