#!/usr/bin/env python3
"""Walks the include graph: includes go down the stairs only (runtime -> optim -> comm -> kernels).

Also: promised headers (include/orthrus/) use the standard library and each other, and mpi.hpp alone adds
mpi.h; comm takes the words of kernels, never a verb; workloads and examples use promised headers and their
own folder; studies uses kernels and its own folder; mpi.h, CUDA and yaml-cpp stay out of headers; no file
includes itself by way of others.

check_includes.py [ROOT]
"""

import re
import sys
from pathlib import Path

ROOMS = ("kernels", "comm", "optim", "runtime")  # from the bottom up
STUDIES = ("runtime", "studies")  # mathematics: no rank, no plan
SUFFIXES = {".hpp", ".cpp", ".h", ".cu", ".cuh"}
HEADERS = {".hpp", ".h", ".cuh"}
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.MULTILINE)

# What a promised header may add to the standard library.
PROMISED_EXTRA = {"mpi.hpp": {"mpi.h"}, "nccl.hpp": {"nccl.h", "cuda_runtime.h"}, "torch.hpp": None}
# What comm may take from kernels beside the promised words: no verbs, but how a handle is owned, how a bf16
# reads as f32, and where a piece lies in a tensor.
COMM_BORROWS = {"kernels/handle.hpp", "kernels/bf16.hpp", "kernels/region.hpp"}
# Libraries whose headers stay in .cpp and .cu files.
HIDDEN = re.compile(r"^(mpi\.h|cuda\w*\.h|cublas\w*\.h|nccl\.h|yaml-cpp/.*|yaml\.h|cblas\.h|dnnl\.\w+)$")
STANDARD = re.compile(r"^[a-z0-9_]+$|^(stdint|stddef|stdbool)\.h$")


def place(path):
    """@return (room, part): part is `promised`, `studies`, `outside` (workloads, examples), or `inside`."""
    parts = path.parts
    if "include/orthrus/" in path.as_posix() and parts[1] in ("include", "studies"):
        return parts[0], "promised"
    if parts[:2] == STUDIES:
        return parts[0], "studies"
    if parts[0] == "runtime" and parts[1] in ("workloads", "examples"):
        return parts[0], "outside"
    return parts[0], "inside"


def main():
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    files = sorted(
        p.relative_to(root)
        for room in ROOMS
        for p in (root / room).rglob("*")
        if p.suffix in SUFFIXES and p.is_file() and "build" not in p.relative_to(root).parts
    )
    promised = {f.as_posix().partition("/include/")[2]: f for f in files if place(f)[1] == "promised"}
    graph, problems = {}, []

    for path in files:
        room, part = place(path)
        text = (root / path).read_text(encoding="utf-8")
        graph[path] = []
        if path.suffix in HEADERS and "#pragma once" not in text and path.suffix != ".h":
            problems.append(f"{path}: no #pragma once")
        for match in INCLUDE.finditer(text):
            quoted, name = match[1] == '"', match[2]
            line = text.count("\n", 0, match.start()) + 1

            def refuse(why):
                problems.append(f"{path}:{line}: {name}: {why}")

            if name.startswith("orthrus/"):
                target = promised.get(name)
                if target is None:
                    refuse("no promised header has that name")
                    continue
            elif quoted:
                beside = (root / path.parent / name).resolve()
                target = next(
                    (t.relative_to(root) for t in ((root / name), beside) if t.is_file()), None
                )
                if target is None:
                    refuse("no such file, from the root or beside this one")
                    continue
            else:
                target = None

            if target is None:  # another library's header
                if part == "promised" and not STANDARD.match(name):
                    allowed = PROMISED_EXTRA.get(path.name, set())
                    if allowed is not None and name not in allowed:
                        refuse("a promised header uses the standard library only")
                elif path.suffix in HEADERS and part != "promised" and HIDDEN.match(name):
                    refuse("stays in .cpp and .cu files")
                continue

            graph[path].append(target)
            other, other_part = place(target)
            if other not in ROOMS:
                refuse("outside the four rooms")
            elif part == "outside":
                own = Path(*path.parts[:2] if path.parts[1] == "workloads" else path.parts[:3])
                if other_part != "promised" and own not in target.parents:
                    refuse("workloads and examples use <orthrus/...> and their own folder only")
            elif path.parts[:2] == STUDIES and other != "kernels" and target.parts[:2] != STUDIES:
                refuse("studies is pure: kernels and its own folder only")
            elif ROOMS.index(other) > ROOMS.index(room):
                refuse(f"{room} does not know {other}: includes go down the stairs only")
            elif part == "promised" and other_part != "promised":
                refuse("a promised header includes promised headers only")
            elif room == "comm" and other == "kernels" and other_part != "promised":
                if target.as_posix() not in COMM_BORROWS:
                    refuse("comm takes the words of kernels, never a verb")

    problems += cycles(graph)
    for problem in problems:
        print(problem)
    edges = sum(map(len, graph.values()))
    print(f"{len(files)} files, {edges} includes among them, {len(problems)} against the rules")
    return 1 if problems else 0


def cycles(graph):
    """One line per include cycle met by a depth-first walk."""
    found, state, trail = [], {}, []

    def visit(node):
        state[node] = "open"
        trail.append(node)
        for target in graph.get(node, ()):
            if state.get(target) == "open":
                ring = [*trail[trail.index(target) :], target]
                found.append(f"{node}: includes itself: {' -> '.join(map(str, ring))}")
            elif target not in state:
                visit(target)
        trail.pop()
        state[node] = "done"

    for node in graph:
        if node not in state:
            visit(node)
    return found


if __name__ == "__main__":
    sys.exit(main())
