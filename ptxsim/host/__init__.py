"""The DSL's host code and tensors: the stand-in for its runtime library, launches, CPU tensors that pose as CUDA's."""
