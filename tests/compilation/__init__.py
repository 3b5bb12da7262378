"""What the GPU kernels need of a GPU, known without one: registers, shared memory, spills.

Every Triton kernel is compiled ahead of time for every GPU that it is meant for, under the oldest Triton
that it is meant for and the newest, as calls.py has the ops launch it; launches.py finds out what these calls
launch. The CUDA kernels are read from the built library. Spills, a kernel that doesn't compile, more shared
memory than a GPU has, and products of 16-bit matrices by another instruction than its fastest are errors;
registers are evidence, kept in docs/compilation.md. A Triton kernel of which docs/compilation.json has a
record with the same key, a hash of all that goes into its compilation, isn't compiled again, but for a
sample.

    python -m tests.compilation             compile and print the table
    python -m tests.compilation --write     and write it
    python -m tests.compilation --headers   only compile CUDA C++ against other PyTorchs; see headers.py
    python -m tests.compilation --archs     only say for which GPUs CI has to compile it; see archs.py
"""
