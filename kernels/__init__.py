"""Operations on a shared pool: schemas, plain-torch reference and, on a GPU, Triton kernels."""
