"""The judge of `orthrus replay`: every update rule again, in float64, from the formulas alone.

Nothing here is shared with the library: a reader and writer of safetensors, the coefficient tables, the
rules, the norms. A spectral direction is U p(sigma/nu) V^T of a singular value decomposition, with p the
composition of the named table's polynomials, or the rational function; no Newton-Schulz iteration is run,
and nothing is inverted.
"""

import json
import math
import re
import struct

import numpy as np

# --- files ----------------------------------------------------------------------------------------------


class FileError(Exception):
    """A safetensors file that breaks the format."""


_NUMPY = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1"}


def bf16_bits(x):
    """The upper half of f32(x), rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, dtype="<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def bf16_value(bits):
    return (np.asarray(bits, dtype=np.uint32) << 16).view(np.float32)


def round_bf16(x):
    """x in float64, on the bf16 grid (through f32, as stored weights go)."""
    return bf16_value(bf16_bits(x)).astype(np.float64).reshape(np.shape(x))


def read_safetensors(path):
    """@return ({name: array}, metadata). BF16 arrives as float32."""
    with open(path, "rb") as f:
        blob = f.read()
    if len(blob) < 8:
        raise FileError(f"{path}: {len(blob)} bytes are no safetensors file")
    (length,) = struct.unpack("<Q", blob[:8])
    if length > len(blob) - 8:
        raise FileError(f"{path}: a header of {length} bytes does not fit")

    def unique(pairs):
        names = [k for k, _ in pairs]
        if len(set(names)) != len(names):
            raise FileError(f"{path}: duplicate keys in the header")
        return dict(pairs)

    header = json.loads(blob[8 : 8 + length], object_pairs_hook=unique)
    data = memoryview(blob)[8 + length :]
    metadata = header.pop("__metadata__", {})
    tensors, at = {}, 0
    for name, row in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = row["data_offsets"]
        if begin != at or end > len(data):
            raise FileError(f"{path}: {name} lies at [{begin}, {end}), expected to begin at {at}")
        at = end
        dtype = "<u2" if row["dtype"] == "BF16" else _NUMPY[row["dtype"]]
        array = np.frombuffer(data[begin:end], dtype=dtype)
        if array.size != math.prod(row["shape"]):
            raise FileError(f"{path}: {name} holds {array.size} values, its shape {row['shape']}")
        if row["dtype"] == "BF16":
            array = bf16_value(array)
        tensors[name] = array.reshape(row["shape"])
    if at != len(data):
        raise FileError(f"{path}: {len(data) - at} bytes belong to no tensor")
    return tensors, metadata


def write_safetensors(path, tensors, metadata=None, bf16=()):
    """Writes float32 tensors; those named in `bf16` as BF16."""
    header = {} if metadata is None else {"__metadata__": metadata}
    chunks, at = [], 0
    for name, array in tensors.items():
        chunk = (bf16_bits(array) if name in bf16 else np.ascontiguousarray(array, "<f4")).tobytes()
        header[name] = {
            "dtype": "BF16" if name in bf16 else "F32",
            "shape": list(np.shape(array)),
            "data_offsets": [at, at + len(chunk)],
        }
        chunks.append(chunk)
        at += len(chunk)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)))
        f.write(text)
        for chunk in chunks:
            f.write(chunk)


# --- polynomials ----------------------------------------------------------------------------------------

_PE = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
]
_LAST = (1.875, -1.25, 0.375)

# name: (polynomials, the last of which repeats; factor on the Frobenius norm)
TABLES = {
    "jordan": ([(3.4445, -4.7750, 2.0315)], 1.0),
    "you5": (
        [
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ],
        1.0,
    ),
    "polar_express": (_PE + [_LAST], 1.0),
    "polar_express_101": (
        [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _PE] + [_LAST],
        1.01,
    ),
    "polar_express_105": (
        [
            (7.89258287442441, -20.3830139458796, 13.5553061494069),
            (3.91148486813543, -2.54646359290609, 0.426898831967307),
            (3.76065795569742, -2.51281901821656, 0.432364734907007),
            (3.16039967368629, -2.1496495188985, 0.399636690766439),
            (2.19109716186173, -1.44166201021466, 0.328146487623155),
        ],
        1.0,
    ),
    "dion_pe102": (
        [
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ],
        1.02,
    ),
    "torch_pe10": (
        [
            (8.237312, -23.157747, 16.680568),
            (4.082442, -2.893048, 0.525285),
            (3.926348, -2.854747, 0.531802),
            (3.298219, -2.424542, 0.486320),
            (2.297037, -1.636626, 0.400263),
            (1.876381, -1.234790, 0.358919),
            (1.856442, -1.213245, 0.356800),
            (1.856435, -1.213237, 0.356799),
            (1.856431, -1.213229, 0.356795),
            (1.874995, -1.249991, 0.374995),
        ],
        1.0,
    ),
    "cans": (
        [
            (8.47032880384807, -25.108074706661874, 18.629275599118014),
            (4.182834183293938, -3.1087011098892385, 0.5806066813500486),
            (3.9618572789615993, -2.9540637463593793, 0.5629761179538966),
            (3.2865862170279607, -2.464720134531282, 0.5073576938614548),
            (2.2737499944340396, -1.6446603679080694, 0.4161909274978861),
            (1.8887161973518283, -1.2651572253385992, 0.3765189255574897),
            _LAST,
        ],
        1.0,
    ),
    "eco8": (
        [
            (7.2086, -15.5131, 9.0178),
            (3.9623, -2.5813, 0.4542),
            (3.9466, -2.5765, 0.4544),
            (3.8991, -2.5671, 0.4566),
            (3.7186, -2.5308, 0.4653),
            (3.1390, -2.3073, 0.4733),
            (2.1715, -1.5246, 0.3885),
            (1.8648, -1.2224, 0.3577),
        ],
        1.0,
    ),
    "cubic5": (
        [
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ],
        1.0,
    ),
    "dsv4_10": ([(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)], 1.0),
    "pade5": ([(15 / 8, -10 / 8, 3 / 8)], 1.0),
    "pade3": ([(1.5, -0.5, 0.0)], 1.0),
    "modula": ([(3.0, -16 / 5, 6 / 5)], 1.0),
}


def composed(x, table, iterations):
    """p(x): the first `iterations` polynomials of the table, one after the other."""
    polynomials = TABLES[table][0]
    x = np.array(x, dtype=np.float64)
    for i in range(iterations):
        a, b, c = polynomials[min(i, len(polynomials) - 1)]
        square = x * x
        x = x * (a + square * (b + square * c))
    return x


# --- the rational function ------------------------------------------------------------------------------


def _sn_cn(u, complement):
    """Jacobi's sn and cn of u for the modulus sqrt(1 - complement^2), by the arithmetic-geometric mean."""
    a, b, c = 1.0, complement, math.sqrt(1 - complement * complement)
    ladder = []
    while abs(c) > 1e-16 * a:
        a, b, c = (a + b) / 2, math.sqrt(a * b), (a - b) / 2
        ladder.append((a, c))
    phi = math.ldexp(a * u, len(ladder))
    for mean, difference in reversed(ladder):
        phi = (phi + math.asin(difference / mean * math.sin(phi))) / 2
    return math.sin(phi), math.cos(phi)


def zolotarev(lower, terms):
    """The odd rational function of type (2r + 1, 2r) nearest to 1 on [lower, 1]: x -> f(x)."""
    a, b = 1.0, lower  # K of the modulus sqrt(1 - lower^2) is pi / 2 over this mean
    for _ in range(64):
        a, b = (a + b) / 2, math.sqrt(a * b)
    quarter = math.pi / (2 * a)
    c = []
    for i in range(1, 2 * terms + 1):
        sn, cn = _sn_cn(i * quarter / (2 * terms + 1), lower)
        c.append((lower * sn / cn) ** 2)

    def plain(x):
        square = x * x
        for j in range(terms):
            x = x * (square + c[2 * j + 1]) / (square + c[2 * j])
        return x

    grid = plain(np.geomspace(lower, 1, 200001))
    scale = 2 / (grid.min() + grid.max())
    return lambda x: scale * plain(np.asarray(x, dtype=np.float64))


LOWER_OF_TERMS = {2: 5e-3, 3: 2e-3, 4: 1e-3}


def rational_values(x, sigma, terms):
    """f(sigma / sqrt(s2)). Twelve Lanczos steps find the largest eigenvalue of a Gram matrix of 12 lines."""
    if min(x.shape) > 12:
        raise ValueError("the oracle knows s2 only where 12 Lanczos steps are exact")
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    s2 = min(1.1 * sigma[0] ** 2, np.linalg.norm(gram), np.abs(gram).sum(axis=0).max())
    return zolotarev(LOWER_OF_TERMS[terms], terms)(sigma / math.sqrt(s2))


# --- norms ----------------------------------------------------------------------------------------------

LMO_DEFAULTS = {
    "norm": "spectral",
    "coefficients": "polar_express_101",
    "iterations": 5,
    "scale": "original",
    "eps_mode": "none",
    "eps": 1e-7,
    "dtype": "f32",
    "terms": 3,
}


def _safe_divide(x, by):
    return np.divide(x, by, out=np.zeros_like(x), where=by > 0)


def lmo(x, recipe):
    """The unit-norm matrix along x (for `spectral`, as well as the table's polynomial reaches it)."""
    norm = recipe["norm"]
    if norm == "sign":
        return np.sign(x)
    if norm == "row":
        return _safe_divide(x, np.sqrt((x * x).sum(axis=1, keepdims=True)) + np.zeros_like(x))
    if norm == "column":
        return _safe_divide(x, np.sqrt((x * x).sum(axis=0, keepdims=True)) + np.zeros_like(x))
    frobenius = math.sqrt((x * x).sum())
    if frobenius == 0:
        return np.zeros_like(x)
    if norm == "frobenius":
        return x / frobenius
    if norm != "spectral":
        raise ValueError(norm)
    if recipe["coefficients"] == "rational":
        u, sigma, vt = np.linalg.svd(x, full_matrices=False)
        return (u * rational_values(x, sigma, recipe["terms"])) @ vt
    nu = TABLES[recipe["coefficients"]][1] * frobenius
    if recipe["eps_mode"] == "add":
        nu += recipe["eps"]
    elif recipe["eps_mode"] == "clamp":
        nu = max(nu, recipe["eps"])
    u, sigma, vt = np.linalg.svd(x, full_matrices=False)
    return (u * composed(sigma / nu, recipe["coefficients"], recipe["iterations"])) @ vt


def scale_factor(rows, cols, name):
    return {
        "original": math.sqrt(max(1.0, rows / cols)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, cols)),
        "rms_to_rms": math.sqrt(rows / cols),
        "rms_to_rms_max": max(1.0, math.sqrt(rows / cols)),
        "spectral": 1.0,
    }[name]


# --- rules ----------------------------------------------------------------------------------------------

RULE_DEFAULTS = {
    "muon": {
        "lr": 0.02,
        "momentum": 0.95,
        "nesterov": True,
        "weight_decay": 0.0,
        "momentum_form": "ema",
    },
    "normuon": {
        "lr": 0.02,
        "momentum": 0.95,
        "nesterov": True,
        "weight_decay": 0.0,
        "momentum_form": "ema",
        "beta2": 0.95,
        "eps": 1e-10,
        "axis": "rows",
    },
    "adamw": {
        "lr": 3e-4,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "eps_placement": "torch",
    },
    "sgd": {
        "lr": 0.01,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 0.0,
        "momentum_form": "heavy_ball",
    },
    "lion": {"lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0.0},
}
MATRIX_RULES = ("muon", "normuon")


def _momentum(state, g, rule):
    """Takes g into the momentum; @return what the update looks along."""
    beta = rule["momentum"]
    take = 1 - beta if rule["momentum_form"] == "ema" else 1.0
    state["momentum"] = beta * state["momentum"] + take * g
    return take * g + beta * state["momentum"] if rule["nesterov"] else state["momentum"]


def direction(state, g, step, group):
    """U of one logical matrix (matrix rules) or one tensor; W <- (1 - lr wd) W - lr U."""
    rule, name = group["rule"], group["rule"]["name"]
    if name in MATRIX_RULES:
        d = lmo(_momentum(state, g, rule), group["lmo"])
        if name == "normuon":
            along = 0 if rule["axis"] == "long" and d.shape[1] < d.shape[0] else 1
            lines = (d * d).mean(axis=along)
            beta2 = rule["beta2"]
            state["row_second_moment"] = beta2 * state["row_second_moment"] + (1 - beta2) * lines
            below = np.sqrt(state["row_second_moment"]) + rule["eps"]
            flat = d / (below[:, None] if along else below)
            norm = np.linalg.norm(flat)
            d = flat * (np.linalg.norm(d) / norm) if norm > 0 else flat
        return scale_factor(*d.shape, group["lmo"]["scale"]) * d
    if name == "adamw":
        beta1, beta2 = rule["betas"]
        state["momentum"] = beta1 * state["momentum"] + (1 - beta1) * g
        state["second_moment"] = beta2 * state["second_moment"] + (1 - beta2) * g * g
        first = state["momentum"] / (1 - beta1**step)
        root = math.sqrt(1 - beta2**step)
        if rule["eps_placement"] == "torch":
            below = np.sqrt(state["second_moment"]) / root + rule["eps"]
        else:
            below = (np.sqrt(state["second_moment"]) + rule["eps"]) / root
        return _safe_divide(first, below)
    if name == "lion":
        beta1, beta2 = rule["betas"]
        u = np.sign(beta1 * state["momentum"] + (1 - beta1) * g)
        state["momentum"] = beta2 * state["momentum"] + (1 - beta2) * g
        return u
    if name == "sgd":
        return _momentum(state, g, rule)
    raise ValueError(name)


# --- a whole replay -------------------------------------------------------------------------------------


def matches(pattern, name):
    """`*` any characters, `?` one, `{a,b}` alternatives."""
    regex, depth = "", 0
    for ch in pattern:
        if ch == "{":
            regex, depth = regex + "(?:", depth + 1
        elif ch == "}":
            regex, depth = regex + ")", depth - 1
        else:
            regex += {"*": ".*", "?": "."}.get(ch, "|" if ch == "," and depth else re.escape(ch))
    return re.fullmatch(regex, name) is not None


def group_of(groups, name, ndim):
    """The first group whose pattern matches and whose rule takes tensors of `ndim` dimensions."""
    for group in groups:
        if matches(group["match"], name) and (ndim >= 2 or group["rule"]["name"] not in MATRIX_RULES):
            return {
                **group,
                "rule": {**RULE_DEFAULTS[group["rule"]["name"]], **group["rule"]},
                "lmo": {**LMO_DEFAULTS, **group.get("lmo", {})},
                "weights": {"format": "f32", "residual": "none", **group.get("weights", {})},
            }
    raise ValueError(f"no group takes {name}")


def blocks(shape, group):
    """Slices of the tensor, seen as shape[0] x rest, that are one matrix each."""
    rows, cols = shape[0], math.prod(shape[1:])
    split = group.get("split", {})

    def cut(size, parts):
        if isinstance(parts, int):
            parts = [size // parts] * parts
        edges = np.cumsum([0] + list(parts))
        if edges[-1] != size:
            raise ValueError(f"blocks {parts} of {size}")
        return [slice(a, b) for a, b in zip(edges[:-1], edges[1:])]

    if "rows" in split:
        return [(s, slice(0, cols)) for s in cut(rows, split["rows"])]
    if "cols" in split:
        return [(slice(0, rows), s) for s in cut(cols, split["cols"])]
    return [(slice(0, rows), slice(0, cols))]


def mean_gradient(name, tensors):
    """The gradient itself, or the mean of its contributions name@0, name@1, ..."""
    if name in tensors:
        return tensors[name].astype(np.float64)
    parts = []
    while f"{name}@{len(parts)}" in tensors:
        parts.append(tensors[f"{name}@{len(parts)}"].astype(np.float64))
    return sum(parts[1:], parts[0]) / len(parts)


class Replay:
    """Weights and state of every parameter, moved one recorded step at a time."""

    def __init__(self, groups, weights):
        self.weights = {k: np.asarray(w, dtype=np.float64).copy() for k, w in weights.items()}
        self.groups = {k: group_of(groups, k, w.ndim) for k, w in self.weights.items()}
        self.state, self.master, self.steps = {}, {}, 0
        for name, w in self.weights.items():
            kind = self.groups[name]["rule"]["name"]
            state = {"momentum": np.zeros_like(w)}
            if kind == "adamw":
                state["second_moment"] = np.zeros_like(w)
            if kind == "normuon":
                lines = sum(n for _, n in self._moments(name, w.shape))
                state["row_second_moment"] = np.zeros(lines)
            self.state[name] = state
            self.master[name] = w.copy()

    def step(self, tensors):
        """@return False when a gradient was not finite: nothing has changed then."""
        gradients = {name: mean_gradient(name, tensors) for name in self.weights}
        if not all(np.isfinite(g).all() for g in gradients.values()):
            return False
        self.steps += 1
        self._clip(gradients)
        for name, g in gradients.items():
            group, rule = self.groups[name], self.groups[name]["rule"]
            if rule["name"] in MATRIX_RULES:
                u = self._matrix_direction(name, g, group)
            else:
                u = direction(self.state[name], g, self.steps, group)
            w = (1 - rule["lr"] * rule["weight_decay"]) * self.master[name] - rule["lr"] * u
            stored = round_bf16(w) if group["weights"]["format"] == "bf16" else w
            self.weights[name] = stored
            self.master[name] = w if group["weights"]["residual"] == "master" else stored
        return True

    def _matrix_direction(self, name, g, group):
        shape, state = g.shape, self.state[name]
        flat = g.reshape(shape[0], -1)
        u = np.zeros_like(flat)
        momentum, moments, at = state["momentum"].reshape(flat.shape), state.get("row_second_moment"), 0
        for block, lines in self._moments(name, shape):
            part = {"momentum": momentum[block]}
            if moments is not None:
                part["row_second_moment"] = moments[at : at + lines]
            u[block] = direction(part, flat[block], self.steps, group)
            momentum[block] = part["momentum"]
            if moments is not None:
                moments[at : at + lines] = part["row_second_moment"]
            at += lines
        return u.reshape(shape)

    def _moments(self, name, shape):
        """Every block with the number of its second moments: one per row, or per line of the long side."""
        group = self.groups[name]
        long_side = group["rule"].get("axis") == "long"
        return [
            (b, min(b[0].stop - b[0].start, b[1].stop - b[1].start if long_side else math.inf))
            for b in blocks(shape, group)
        ]

    def _clip(self, gradients):
        """Scales the raw gradients of a group to at most `clip_norm`, their norm taken together."""
        for pattern in {g["match"] for g in self.groups.values()}:
            members = [n for n, g in self.groups.items() if g["match"] == pattern]
            limit = self.groups[members[0]].get("clip_norm", 0)
            if not limit:
                continue
            norm = math.sqrt(sum(float((gradients[n] ** 2).sum()) for n in members))
            if norm > limit:
                for n in members:
                    gradients[n] = gradients[n] * (limit / norm)


def error(w, reference, start):
    """||W - W_ref||_F / ||W_ref - W_0||_F."""
    moved = np.linalg.norm(reference - start)
    off = np.linalg.norm(np.asarray(w, dtype=np.float64) - reference)
    return off / moved if moved > 0 else off
