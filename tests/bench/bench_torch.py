#!/usr/bin/env python3
"""This library's msign beside PyTorch's five bf16 quintics, in turns, on one core.

usage: bench_torch.py [--bench build/bin/bench_msign] [--core N] [--rounds N] [--shapes ROWSxCOLS,…]
                      [--methods M,…] [--out FILE]

Both get f32 matrices and give bf16 ones; normalization and casts are inside both clocks. A round times every
method once, one after another, so that all of them see the same machine. Ratios are medians over rounds of
peer/method. A shape COUNTxROWSxCOLS is a batch: this library takes its matrices one after another, PyTorch
one after another (`loop`) or by batched products (`bmm`).

Peers:     torch        X@X.T, b*A + c*A@A, a*X + B@X: Newton-Schulz as it is published
           torch_fused  the same by addmm (baddbmm), which saves passes over memory
Ratios are against the faster of all peers of the shape, and against `torch` beside it. Errors are
max |u_i^T O v_i - 1| over sigma_i >= 5e-3 sigma_max, in float64, u and v from numpy's SVD, on Gaussian
matrices and on such with singular values i^-1/2 and 1/i.

Prints JSON lines (to FILE with --out), then a table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # before torch and numpy read them

SHAPES = "768x768,768x2304,768x3072,1024x4096,3072x768,32x128x128,32x64x64"
METHODS = ("jordan:bf16,jordan:f32,polar_express_101:bf16,polar_express_101:f32,rational:f32:3,rational:bf16:3,"
           "rational:f32:2,rational:bf16:2,auto:bf16,plain_bf16,plain_f32")
JORDAN = (3.4445, -4.7750, 2.0315)
SPECTRA = ("Gaussian", "i^-1/2", "1/i")


def quintics(torch, g, fused):
    """Newton-Schulz of a matrix or of a batch: bf16 of f32 `g`, in bf16."""
    a, b, c = JORDAN
    x = g.bfloat16()
    transposed = x.size(-2) > x.size(-1)
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    add = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(5):
        gram = x @ x.mT
        if fused:
            polynomial = add(gram, gram, gram, beta=b, alpha=c)
            x = add(x, polynomial, x, beta=a)
        else:
            x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


def exact_quintics(numpy, g):
    """The same iterations of one matrix in float64."""
    a, b, c = JORDAN
    x = g.astype(numpy.float64)
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / (numpy.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


class Bench:
    """A bench_msign that answers requests."""

    def __init__(self, program):
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *words):
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"bench_msign ended at: {words}")
        if answer.startswith("error"):
            raise RuntimeError(f"{words[0]} {words[1] if len(words) > 1 else ''}: {answer}")
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Judge:
    """One Gaussian matrix of a shape, its SVD, and matrices of other spectra with the same u and v."""

    def __init__(self, numpy, rows, cols, seed):
        gaussian = numpy.random.default_rng(seed).standard_normal((rows, cols))
        self.numpy = numpy
        self.u, sigma, self.v = numpy.linalg.svd(gaussian, full_matrices=False)
        i = numpy.arange(1, len(sigma) + 1)
        self.sigma = dict(zip(SPECTRA, (sigma, i**-0.5, 1.0 / i)))
        self.matrices = {name: ((self.u * s) @ self.v).astype(numpy.float32) for name, s in self.sigma.items()}

    def error(self, spectrum, o):
        diagonal = self.numpy.einsum("ri,rc,ic->i", self.u, o.astype(self.numpy.float64), self.v, optimize=True)
        sigma = self.sigma[spectrum]
        return float(self.numpy.abs(diagonal - 1)[sigma >= 5e-3 * sigma[0]].max())


def parse_shape(text):
    sizes = [int(n) for n in text.split("x")]
    if len(sizes) not in (2, 3) or min(sizes) < 1:
        sys.exit(f"'{text}' is neither ROWSxCOLS nor COUNTxROWSxCOLS")
    return sizes if len(sizes) == 3 else [1, *sizes]


def peers_of(torch, count):
    """name -> (f32 matrices as one tensor) -> bf16 result."""
    def loop(fused):
        return lambda g: torch.stack([quintics(torch, m, fused) for m in g])

    def one(fused):
        return lambda g: quintics(torch, g[0], fused)[None]

    if count == 1:
        return {"torch": one(False), "torch_fused": one(True)}
    return {"torch": loop(False), "torch_fused": loop(True),
            "torch_bmm": lambda g: quintics(torch, g, False),
            "torch_bmm_fused": lambda g: quintics(torch, g, True)}


def measure(torch, numpy, bench, text, methods, rounds, folder):
    """One JSON object for a shape."""
    import time

    count, rows, cols = parse_shape(text)
    judges = [Judge(numpy, rows, cols, seed) for seed in range(min(count, 4))]
    path = os.path.join(folder, "matrices")
    saved = os.path.join(folder, "result")
    peers = peers_of(torch, count)
    errors = {name: {} for name in [*methods, *peers]}
    difference = None

    def matrices(spectrum):
        return numpy.stack([judges[i % len(judges)].matrices[spectrum] for i in range(count)])

    for spectrum in reversed(SPECTRA):  # Gaussian last: what is timed
        x = matrices(spectrum)
        x.tofile(path)
        bench.ask("matrices", count, rows, cols, path)
        worst = lambda o: max(judges[i].error(spectrum, o[i]) for i in range(len(judges)))
        results = {}
        for method in methods:
            bench.ask("run", method)
            bench.ask("save", saved)
            results[method] = numpy.fromfile(saved, dtype=numpy.float32).reshape(x.shape)
            errors[method][spectrum] = worst(results[method])
        for name, peer in peers.items():
            results[name] = peer(torch.from_numpy(x)).float().numpy()
            errors[name][spectrum] = worst(results[name])
        if "jordan:bf16" in results and spectrum == "Gaussian":
            # Two roundings of one iteration: each is as far from it as from the other.
            exact = exact_quintics(numpy, x[0])
            ours, theirs = results["jordan:bf16"][0], results["torch"][0]
            rms = lambda d: float(numpy.sqrt((d.astype(numpy.float64)**2).mean()))
            difference = {"max": float(numpy.abs(ours - theirs).max()), "rms": rms(ours - theirs),
                          "rms_to_exact": rms(ours - exact), "torch_rms_to_exact": rms(theirs - exact),
                          "rms_of_entries": rms(exact)}

    tensor = torch.from_numpy(matrices("Gaussian"))
    ms = {name: [] for name in [*methods, *peers]}
    for round_ in range(-1, rounds):  # the first warms up
        for method in methods:
            t = float(bench.ask("run", method))
            if round_ >= 0:
                ms[method].append(t)
        for name, peer in peers.items():
            start = time.perf_counter()
            peer(tensor)
            t = (time.perf_counter() - start) * 1e3
            if round_ >= 0:
                ms[name].append(t)
    best = min(peers, key=lambda name: statistics.median(ms[name]))
    ratio = lambda method, peer: statistics.median(p / m for p, m in zip(ms[peer], ms[method]))
    side, length = min(rows, cols), max(rows, cols)
    nominal = count * 5 * (4 * side**2 * length + 2 * side**3)
    return {
        "shape": text, "rounds": rounds, "best_peer": best,
        "methods": {
            name: {"median_ms": statistics.median(ms[name]), "least_ms": min(ms[name]),
                   "spread": (max(ms[name]) - min(ms[name])) / statistics.median(ms[name]),
                   "ratio_to_best_peer": ratio(name, best), "ratio_to_torch": ratio(name, "torch"),
                   "nominal_gflops": nominal / statistics.median(ms[name]) * 1e-6,
                   "errors": errors[name]}
            for name in ms
        },
        "jordan_bf16_minus_torch": difference,
    }


def table(lines):
    out = []
    for line in lines:
        if "methods" not in line:
            continue
        out.append(f"\n{line['shape']}: best peer {line['best_peer']}")
        out.append(f"  {'method':<24}{'ms':>10}{'spread':>8}{'× torch':>9}{'× best':>8}   error on "
                   + ", ".join(SPECTRA))
        for name, m in line["methods"].items():
            out.append(f"  {name:<24}{m['median_ms']:>10.2f}{m['spread'] * 100:>7.0f}%{m['ratio_to_torch']:>9.2f}"
                       f"{m['ratio_to_best_peer']:>8.2f}   " + "  ".join(f"{m['errors'][s]:.3f}" for s in SPECTRA))
        d = line["jordan_bf16_minus_torch"]
        if d:
            out.append(f"  jordan:bf16 - torch: at most {d['max']:.1e}, rms {d['rms']:.1e}; from float64 rms "
                       f"{d['rms_to_exact']:.1e} and {d['torch_rms_to_exact']:.1e}; entries have rms "
                       f"{d['rms_of_entries']:.1e}")
    return "\n".join(out)


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", default=os.path.join(here, "../../build/bin/bench_msign"))
    parser.add_argument("--core", type=int, default=0, help="the one both run on")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--out", help="JSON lines go there")
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("--rounds: 5 at least")
    os.sched_setaffinity(0, {options.core})

    import numpy
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    bench = Bench(options.bench)
    lines = [{"name": "versions", "torch": torch.__version__, "orthrus": bench.ask("version"),
              "numpy": numpy.__version__, "core": options.core, "command": " ".join(sys.argv)}]
    out = open(options.out, "w") if options.out else sys.stdout
    print(json.dumps(lines[0]), file=out, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes.split(","):
            lines.append(measure(torch, numpy, bench, shape, options.methods.split(","), options.rounds, folder))
            print(json.dumps(lines[-1]), file=out, flush=True)
    bench.close()
    if options.out:
        out.close()
    print(f"\nPyTorch {torch.__version__} and {lines[0]['orthrus']}, one thread each on core {options.core}, "
          f"{options.rounds} rounds" + table(lines))


if __name__ == "__main__":
    main()
