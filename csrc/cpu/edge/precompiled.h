// PyTorch's headers. They take longer to compile than most files that include them: setup.py has it done once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
