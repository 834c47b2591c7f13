"""What the package promises of speed, memory and safety, measured against how it is done today.

``make bench`` runs everything, ``make bench ONLY=capture`` one script, ``make bench QUICK=1`` shows
in minutes that all of it works (its numbers mean nothing, and go to ``_build/benchmarks``). Each
script prints a table and writes ``results/<name>.json``.

How times are compared: both ways run in the same process, one after the other, and which is first
changes with every repeat; the first rounds are not counted. From each round comes one ratio.
``measured`` is the median of these ratios, and ``spread`` its 95 % interval by the bootstrap over
rounds. So a machine that slows down for a while slows down both sides.

How memory is compared: as the most bytes that tensors held at once, counted by PyTorch's own
allocators, not the process's resident memory, which keeps what is freed and is rounded to pages.

A promise ``holds`` if the number in the file meets the goal in the file. Rows under ``information``
promise nothing: they say what today's way costs, and how noisy the machine was. Measured are pocket
LLaVA on the CPU, and where there is a GPU also the shapes of LLaVA-1.5-7B and Qwen2-VL-7B with
random weights, which take as long as trained ones.
"""

import os

# PyTorch's profiler, which counts memory, otherwise talks between the progress bars
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
