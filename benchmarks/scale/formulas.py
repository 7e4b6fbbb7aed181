"""What the comparison of formulas costs that are large or made to hang, each in a process of its own.

    python benchmarks/scale/formulas.py

Seconds of the processor, both ways round; the first line is a comparison of two plain numbers, which all contain.
"""

from __future__ import annotations

import os
import resource
import sys
import time

from mmr1_ds.rewards.answers import answers_equal

MOST_SECONDS = 20
PLAIN = ("\\sqrt{12}", "2\\sqrt3")
PAIRS = [
    PLAIN, ("9^{9^{9^9}}", "\\sqrt7"),
    ("(x+1)^{5000}", "x^2+1"), ("(" * 500 + "1" + ")" * 500, "\\sqrt7"), ("(10!)!", "\\sqrt7"),
    ("2^{999^{999}}", "\\sqrt7"), ("2^{200!}", "\\sqrt7"), ("\\sin(" * 40 + "x" + ")" * 40, "\\sqrt7"),
    ("(x+1)^{20}(y+1)^{20}", "\\sqrt7"), ("(a+b+c+d+e+f+g+h)^{12}", "(a+b+c+d+e+f+g)^{12}"),
    ("(\\sin x+\\cos x)^{40}", "(\\sin x-\\cos x)^{40}"), ("(\\sqrt2+\\sqrt3+\\sqrt5+\\sqrt7)^{40}", "\\sqrt2"),
    ("\\frac{x^{1000}-1}{x-1}", "x^{999}+1"), ("\\tan(\\tan(\\tan(\\tan(7))))", "\\sqrt7"),
    ("+".join(["x"] * 150), "2x"),
    ("\\frac{d^{40}}{dx^{40}}(\\sin x)^{9}", "\\sqrt7"), ("\\sum_{n=1}^{1000000} n", "7"), ("2x" * 140, "x^2"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}^{100}", "\\sqrt2"), ("(x+y)^{40}", "(x-y)^{40}"),
    ("\\frac{\\sin(7x)+\\cos(5x)+\\tan(3x)}{\\sin(3x)+\\cos x}=y", "\\frac{\\sin(7x)}{\\cos x}=y"),
    (",".join(f"\\sqrt{{{k}}}" for k in range(49)), ",".join(f"\\sqrt{{{k}}}" for k in range(1, 50))),
]  # fmt: skip


def main() -> None:
    answers_equal(*PLAIN)  # the imports
    answers_equal("y=2x+1", "y=1+2x")
    for one, other in PAIRS:
        seconds = [timed(*pair) for pair in ((one, other), (other, one))]
        sys.stdout.write(f"{max(seconds):6.2f} s  {one[:50]}  =?  {other[:40]}\n")
        sys.stdout.flush()


def timed(answer: str, truth: str) -> float:
    """Return the seconds of a comparison in a fork, at most MOST_SECONDS."""
    end, start = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
        begin = time.process_time()
        try:
            answers_equal(answer, truth)
            os.write(start, f"{time.process_time() - begin}".encode())
        finally:
            os._exit(0)
    os.close(start)
    os.waitpid(child, 0)
    found = os.read(end, 100)
    os.close(end)
    return float(found or MOST_SECONDS)


if __name__ == "__main__":
    main()
