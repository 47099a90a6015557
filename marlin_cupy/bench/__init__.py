"""Measure this machine: GEMM times beside peers and the read floor, host overhead per call, compile times."""
