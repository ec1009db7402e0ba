#!/usr/bin/env python3
"""The whole optimizer step on GPT-2 124M's shapes: a distributed Muon in PyTorch beside `orthrus bench step`.

usage: torch_muon.py [--orthrus build/bin/orthrus] [--ranks 2] [--rounds 3] [--steps 5] [--rules R,…]
                     [--cases matrices,model] [--gradients local,averaged] [--out FILE]

PyTorch: gloo, one thread per process. Each matrix of the layers has an owner, dealt out in turn; the owner
alone keeps its momentum (0.95, Nesterov), orthogonalizes it by five bf16 quintics and applies the update
(decoupled weight decay); the new weights of each round of owners go to all by one all-gather (those of
equal shape share it, so no padding is sent).  Fused Q, K, V are three matrices on both sides. In the case
`model` embeddings, norms and biases get AdamW, on every process alike: at this size that is faster than
sharing it and sending 158 MB of weights. `matrices` leaves them out on both sides.

gradients  local     each process has its own; both sides average them inside the step: PyTorch by all-reduces
                     of 25 MB flat buckets, as its DDP does
           averaged  they are the same already; neither side sends any

The two sides take turns, `rounds` times for every rule: PyTorch's processes run `steps` steps and then sleep,
then `mpirun -np 2 orthrus bench step` starts, runs as many of that rule and ends. Times are those of the slower
process, ratios medians of a turn's. Prints JSON lines (to FILE with --out) and a table.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

JORDAN = (3.4445, -4.7750, 2.0315)
BUCKET_BYTES = 25 << 20
WIDTH = 768


def gpt2_shapes():
    """(matrices of the layers, everything else) of GPT-2 124M; 124,439,808 numbers in all."""
    c = WIDTH
    matrices, rest = [], [(50257, c), (1024, c), (c,), (c,)]
    for _ in range(12):
        matrices += [(c, c)] * 4 + [(4 * c, c), (c, 4 * c)]
        rest += [(c,)] * 4 + [(3 * c,), (c,), (4 * c,), (c,)]
    return matrices, rest


# ---- PyTorch's side: one process --------------------------------------------------------------------


class Muon:
    """Round-robin owners within each shape; an all-gather per `world` matrices."""

    def __init__(self, torch, dist, parameters, lr=0.02, momentum=0.95, weight_decay=0.1):
        self.torch, self.dist = torch, dist
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        by_shape = {}
        for p in parameters:
            by_shape.setdefault(tuple(p.shape), []).append(p)
        self.rounds = [group[i:i + self.world] for group in by_shape.values()
                       for i in range(0, len(group), self.world)]
        self.state = {id(r[self.rank]): torch.zeros_like(r[self.rank]) for r in self.rounds if self.rank < len(r)}

    def orthogonalize(self, g):
        a, b, c = JORDAN
        x = g.bfloat16()
        tall = x.size(0) > x.size(1)
        if tall:
            x = x.T
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = self.torch.addmm(x, self.torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.T if tall else x

    def step(self):
        waits = []
        for owned in self.rounds:
            mine = owned[self.rank] if self.rank < len(owned) else None
            if mine is not None:
                buffer = self.state[id(mine)]
                buffer.lerp_(mine.grad, 1 - self.momentum)
                update = self.orthogonalize(mine.grad.lerp(buffer, self.momentum))
                mine.mul_(1 - self.lr * self.weight_decay)
                mine.add_(update, alpha=-self.lr * max(1, mine.size(0) / mine.size(1)) ** 0.5)
            if self.world > 1:
                # A round that is not full has stand-ins, of which nothing is kept.
                places = [*owned, *[self.torch.empty_like(owned[0])] * (self.world - len(owned))]
                source = mine if mine is not None else places[self.rank]
                # gloo writes into the places given: other ranks' parameters directly.
                waits.append(self.dist.all_gather(places, source.clone(), async_op=True))
        for wait in waits:
            wait.wait()


def buckets_of(torch, gradients):
    """Gradients as views of flat buckets, as DDP keeps them: nothing is packed in the step."""
    buckets, views, pending, size = [], [], [], 0

    def close():
        nonlocal pending, size
        flat = torch.empty(size)
        at = 0
        for g in pending:
            view = flat[at:at + g.numel()].view(g.shape)
            view.copy_(g)
            views.append(view)
            at += g.numel()
        buckets.append(flat)
        pending, size = [], 0

    for g in gradients:
        pending.append(g)
        size += g.numel()
        if size * 4 >= BUCKET_BYTES:
            close()
    if pending:
        close()
    return buckets, views


def worker(rank, world, store, case, gradients):
    """Answers every number of steps on stdin with the ms of each, as JSON on stdout."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
    torch.manual_seed(1)
    matrices, rest = gpt2_shapes()
    shapes = matrices + (rest if case == "model" else [])
    parameters = [torch.randn(s) * 0.02 for s in shapes]
    buckets, views = buckets_of(torch, [torch.randn(s) for s in shapes])
    for p, g in zip(parameters, views):
        p.grad = g
    muon = Muon(torch, dist, parameters[:len(matrices)])
    adamw = None
    if case == "model":
        options = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
        try:
            adamw = torch.optim.AdamW(parameters[len(matrices):], fused=True, **options)
        except (RuntimeError, TypeError):  # older ones have no fused update of host memory
            adamw = torch.optim.AdamW(parameters[len(matrices):], **options)

    def step():
        if gradients == "local" and world > 1:
            waits = [dist.all_reduce(b, async_op=True) for b in buckets]
            for bucket, wait in zip(buckets, waits):
                wait.wait()
                bucket.div_(world)
        muon.step()
        if adamw is not None:
            adamw.step()

    step()
    same = torch.stack([p.double().sum() for p in parameters])
    both = same.clone()
    dist.all_reduce(both)
    assert torch.allclose(both, same * world), "processes differ in their weights"
    print(json.dumps({"torch": torch.__version__, "parameters": sum(p.numel() for p in parameters)}), flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line) + 1):  # the first warms up
            dist.barrier()
            start = time.perf_counter()
            step()
            ms = torch.tensor([(time.perf_counter() - start) * 1e3])
            dist.all_reduce(ms, op=dist.ReduceOp.MAX)
            times.append(ms.item())
        print(json.dumps(times[1:]), flush=True)
    dist.destroy_process_group()


# ---- the comparison -----------------------------------------------------------------------------------


class Peer:
    def __init__(self, ranks, case, gradients, folder):
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
        store = os.path.join(folder, f"{case}-{gradients}")
        self.workers = [
            subprocess.Popen([sys.executable, os.path.abspath(__file__), "--worker", str(r), str(ranks), store, case,
                              gradients], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            for r in range(ranks)]
        self.versions = [self.answer(w) for w in self.workers][0]

    @staticmethod
    def answer(worker_):
        line = worker_.stdout.readline()
        if not line:
            raise RuntimeError("a PyTorch process ended")
        return json.loads(line)

    def run(self, steps):
        for w in self.workers:
            w.stdin.write(f"{steps}\n")
            w.stdin.flush()
        return [self.answer(w) for w in self.workers][0]

    def close(self):
        for w in self.workers:
            w.stdin.close()
        for w in self.workers:
            w.wait()


def orthrus(options, case, gradients, rule, folder):
    """The line of bench step."""
    command = [options.orthrus, "bench", "step", "--json", "--model", "gpt2-124m", "--repeats", str(options.steps),
               "--rules", rule, "--gradients", gradients]
    if case == "matrices":
        command.append("--matrices-only")
    if options.ranks > 1:
        command = [*options.mpirun.split(), "-np", str(options.ranks), *command]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=folder)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")
    return json.loads(done.stdout)


def compare(options, case, gradients, folder):
    peer = Peer(options.ranks, case, gradients, folder)
    turns = {rule: [] for rule in options.rules.split(",")}
    for _ in range(options.rounds):
        for rule, made in turns.items():
            torch_ms = statistics.median(peer.run(options.steps))
            line = orthrus(options, case, gradients, rule, folder)
            if line["parameters"] != peer.versions["parameters"]:
                raise RuntimeError(f"the two sides do not have the same parameters: {peer.versions} and {line}")
            made.append((torch_ms, line))
    peer.close()
    every = [torch_ms for made in turns.values() for torch_ms, _ in made]
    return {
        "name": "step", "model": "gpt2-124m", "case": case, "gradients": gradients, "ranks": options.ranks,
        "parameters": peer.versions["parameters"], "rounds": options.rounds, "steps": options.steps,
        "torch": {"version": peer.versions["torch"], "median_ms": statistics.median(every), "rounds_ms": every},
        "orthrus": {
            rule: {"median_ms": statistics.median(line["median_ms"] for _, line in made),
                   "rounds_ms": [line["median_ms"] for _, line in made],
                   "ratio": statistics.median(torch_ms / line["median_ms"] for torch_ms, line in made),
                   **{key: made[-1][1][key] for key in ("bytes_sent", "messages", "matrices", "rank0_ms")}}
            for rule, made in turns.items()},
    }


def main():
    if len(sys.argv) == 7 and sys.argv[1] == "--worker":
        worker(int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
        return
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orthrus", default=os.path.join(here, "../../build/bin/orthrus"))
    parser.add_argument("--mpirun", default="mpirun --bind-to none")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rules", default="muon:jordan:bf16,muon:polar_express_101:bf16,muon:rational:f32,"
                                           "muon:rational:bf16,muon:auto:bf16")
    parser.add_argument("--cases", default="matrices,model")
    parser.add_argument("--gradients", default="local,averaged")
    parser.add_argument("--out", help="JSON lines go there")
    options = parser.parse_args()
    options.orthrus = os.path.abspath(options.orthrus)
    if options.steps < 5:
        parser.error("--steps: 5 at least")
    if options.ranks > 1 and not shutil.which(options.mpirun.split()[0]):
        parser.error(f"no {options.mpirun.split()[0]}")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"

    out = open(options.out, "w") if options.out else sys.stdout
    with tempfile.TemporaryDirectory() as folder:
        for case in options.cases.split(","):
            for gradients in options.gradients.split(","):
                line = compare(options, case, gradients, folder)
                print(json.dumps(line), file=out, flush=True)
                print(f"\n{case}, gradients {gradients}, {options.ranks} ranks: PyTorch {line['torch']['version']} "
                      f"{line['torch']['median_ms']:.0f} ms", file=sys.stderr)
                for rule, r in line["orthrus"].items():
                    print(f"  {rule:<30}{r['median_ms']:>8.0f} ms  × {r['ratio']:.2f}  sent "
                          f"{r['bytes_sent'] / 1e6:.0f} MB in {r['messages']} messages", file=sys.stderr)
    if options.out:
        out.close()


if __name__ == "__main__":
    main()
