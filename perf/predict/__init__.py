"""Predicted times: kernels simulated on a few tiles, replayed by the timing model, composed to a whole problem."""
