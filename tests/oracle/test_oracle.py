"""The oracle against itself: two ways to the same number, and the published error tables."""

import itertools
import os
import tempfile
import unittest

import numpy as np

import oracle


def newton_schulz(x, table, iterations):
    """The iteration as everybody runs it, in float64."""
    polynomials, safety = oracle.TABLES[table]
    x = x / (safety * np.linalg.norm(x))
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    for i in range(iterations):
        a, b, c = polynomials[min(i, len(polynomials) - 1)]
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if flip else x


# max |p(x) - 1| on [l, 1] for l = 1e-1, 1e-2, 1e-3, 1e-4: a selection of the published figures.
ERRORS = {
    ("jordan", 5): (0.318, 0.318, 0.530, 0.952),
    ("you5", 5): (0.0318, 0.0318, 0.525, 0.951),
    ("polar_express", 5): (0.1236, 0.1236, 0.1236, 0.898),
    ("polar_express", 6): (1.19e-3, 1.19e-3, 1.19e-3, 0.808),
    ("polar_express_101", 5): (0.130, 0.130, 0.154, 0.903),
    ("polar_express_101", 7): (4.7e-6, 4.7e-6, 9.1e-6, 0.670),
    ("polar_express_105", 5): (0.154, 0.154, 0.271, 0.920),
    ("torch_pe10", 5): (0.131, 0.131, 0.137, 0.900),
    ("dion_pe102", 5): (0.141, 0.141, 0.141, 0.901),
    ("cans", 5): (0.113, 0.113, 0.113, 0.895),
    ("eco8", 8): (7.26e-4, 7.26e-4, 7.26e-4, 9.8e-4),
    ("cubic5", 5): (0.300, 0.300, 0.881, 0.988),
    ("dsv4_10", 10): (5.4e-4, 5.4e-4, 5.4e-4, 2.0e-3),
    ("pade5", 5): (4.2e-3, 0.772, 0.977, 0.998),
    ("pade3", 8): (1.7e-3, 0.748, 0.974, 0.997),
    ("modula", 5): (0.0185, 0.188, 0.759, 0.976),
}


class Oracle(unittest.TestCase):
    def test_the_scalar_polynomial_is_the_matrix_iteration(self):
        rng = np.random.default_rng(1)
        for table in oracle.TABLES:
            for shape in ((9, 17), (12, 12), (17, 9), (1, 7), (7, 1)):
                x = rng.standard_normal(shape)
                recipe = {**oracle.LMO_DEFAULTS, "coefficients": table}
                d = oracle.lmo(x, recipe)
                off = np.abs(d - newton_schulz(x, table, 5)).max()
                # One row or column puts sigma at the top of the tables' range, where an optimal
                # composition is steep (slope 3e4): rounding of 1e-16 comes out as 1e-11.
                self.assertLess(off, 1e-10 if 1 in shape else 1e-12, (table, shape))

    def test_the_gram_matrix_of_shards_is_enough(self):
        """QX, where Q is a polynomial in the sum of the shards' X_r X_r^T: mode gram in exact arithmetic."""
        rng = np.random.default_rng(5)
        for rows, cols, shards in ((9, 17, 3), (12, 12, 5), (1, 7, 4), (17, 9, 2)):
            x = rng.standard_normal((rows, cols))
            polynomials, safety = oracle.TABLES["polar_express_101"]
            pieces = np.array_split(x, shards, axis=1)  # some empty
            gram = sum(p @ p.T for p in pieces)
            r = gram / (safety**2 * np.trace(gram))
            q = np.eye(rows) / (safety * np.sqrt(np.trace(gram)))
            for i in range(5):
                a, b, c = polynomials[min(i, len(polynomials) - 1)]
                z = a * np.eye(rows) + b * r + c * r @ r
                q, r = q @ z, z @ r @ z
            off = np.abs(np.hstack([q @ p for p in pieces]) - oracle.lmo(x, oracle.LMO_DEFAULTS)).max()
            # Eigenvalues of R are squares: rounding of 1e-16 enters as its root times the slope at 0.
            self.assertLess(off, 1e-9 if rows <= cols else 1e-4, (rows, cols))

    def test_tables_have_the_published_errors(self):
        for (table, iterations), row in ERRORS.items():
            for low, printed in zip((1e-1, 1e-2, 1e-3, 1e-4), row):
                x = np.concatenate([np.geomspace(low, 1, 40000), np.linspace(low, 1, 40000)])
                found = np.abs(oracle.composed(x, table, iterations) - 1).max()
                # Half a digit of the printed figure.
                self.assertAlmostEqual(found / printed, 1, delta=0.03, msg=(table, iterations, low))

    def test_the_rational_function_has_the_specified_errors(self):
        printed = {(5e-3, 2): 9.952352e-02, (2e-3, 3): 4.247539e-02, (1e-3, 4): 1.889941e-02}
        for (lower, terms), error in printed.items():
            x = np.geomspace(lower, 1, 50001)
            f = oracle.zolotarev(lower, terms)
            self.assertAlmostEqual(np.abs(f(x) - 1).max() / error, 1, delta=1e-6)
            # Below the interval it decreases to zero.
            self.assertTrue(np.all(np.diff(f(np.linspace(0, lower, 1000))) > 0))

    def test_both_momentum_forms_walk_the_same_way(self):
        rng = np.random.default_rng(2)
        gradients = [{"w": rng.standard_normal((6, 9))} for _ in range(20)]
        ends = []
        for form in ("ema", "heavy_ball"):
            group = {"match": "*", "rule": {"name": "muon", "lr": 0.1, "momentum_form": form}}
            replay = oracle.Replay([group], {"w": np.zeros((6, 9))})
            for g in gradients:
                self.assertTrue(replay.step(g))
            ends.append(replay.weights["w"])
        self.assertLess(np.abs(ends[0] - ends[1]).max(), 1e-11)

    def test_normuon_evens_out_the_rows(self):
        x = np.random.default_rng(3).standard_normal((5, 11))
        group = oracle.group_of([{"match": "*", "rule": {"name": "normuon", "beta2": 0.9}}], "w", 2)
        state = {"momentum": np.zeros_like(x), "row_second_moment": np.zeros(5)}
        u = direction_of(state, x, group)
        d = oracle.lmo(x, group["lmo"])
        rows = np.linalg.norm(u, axis=1)
        self.assertAlmostEqual(np.linalg.norm(u), np.linalg.norm(d), 9)
        self.assertLess(np.ptp(rows), 1e-7)  # eps over the root of a row's second moment

    def test_adamw_walks_at_the_rate_under_a_constant_gradient(self):
        g = np.array([[3.0, -2.0], [1e-3, -1e6]])
        group = {"match": "*", "rule": {"name": "adamw", "lr": 0.5, "eps": 0.0}}
        replay = oracle.Replay([group], {"w": np.zeros((2, 2))})
        for _ in range(7):
            replay.step({"w": g})
        self.assertLess(np.abs(replay.weights["w"] + 7 * 0.5 * np.sign(g)).max(), 1e-12)

    def test_contributions_are_averaged_and_bad_steps_skipped(self):
        group = {"match": "*", "rule": {"name": "sgd", "lr": 1.0, "momentum": 0.0}}
        replay = oracle.Replay([group], {"w": np.zeros(3)})
        self.assertTrue(replay.step({"w@0": np.array([1.0, 2, 3]), "w@1": np.array([3.0, 2, 1])}))
        self.assertFalse(replay.step({"w": np.array([1.0, np.nan, 1])}))
        self.assertEqual(replay.weights["w"].tolist(), [-2, -2, -2])
        self.assertEqual(replay.steps, 1)

    def test_patterns(self):
        self.assertTrue(oracle.matches("layers.*.{attn,mlp}.*.weight", "layers.0.mlp.up.weight"))
        self.assertFalse(oracle.matches("layers.*.{attn,mlp}.*.weight", "layers.0.norm.weight"))
        self.assertTrue(oracle.matches("a?c.*", "abc.d.e"))

    def test_files_come_back(self):
        rng = np.random.default_rng(4)
        tensors = {
            "a": rng.standard_normal((3, 5)).astype("f4"),
            "b": oracle.round_bf16(rng.standard_normal(7)).astype("f4"),
            "s": np.float32(2.5).reshape(()),
        }
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "x.safetensors")
            oracle.write_safetensors(path, tensors, {"k": "v"}, bf16=("b",))
            back, metadata = oracle.read_safetensors(path)
        self.assertEqual(metadata, {"k": "v"})
        for name, array in tensors.items():
            self.assertTrue(np.array_equal(array, back[name]), name)

    def test_bf16_rounds_to_even(self):
        one, ulp = 1.0, 2.0**-7
        self.assertEqual(oracle.round_bf16(np.array([one + ulp / 2]))[0], one)
        self.assertEqual(oracle.round_bf16(np.array([one + 1.5 * ulp]))[0], one + 2 * ulp)

    def test_small_floats_are_the_specified_ones(self):
        # (how many numbers >= 0, smallest > 0, smallest with a full mantissa, largest)
        for name, row in {
            "fp8_e4m3": (127, 2.0**-9, 2.0**-6, 448.0),
            "fp8_e5m2": (124, 2.0**-16, 2.0**-14, 57344.0),
        }.items():
            v = oracle.MAGNITUDES[name]
            steps = 8 if name == "fp8_e4m3" else 4
            self.assertEqual((len(v), v[1], v[steps], v[-1]), row)
            # ulp(z) = 2^(max(floor(log2 z), smallest exponent) - mantissa bits)
            ulp = 2.0 ** (np.floor(np.log2(np.maximum(v[1:-1], row[2]))) - np.log2(steps))
            self.assertTrue(np.array_equal(np.diff(v)[1:], ulp))

    def test_codes_are_read_as_they_are_packed(self):
        grid = oracle.Grid({"format": "int4"})
        packed = np.array([[0x2F, 0x09], [0x81, 0x07]], dtype="u1")  # low nibble first, the last empty
        self.assertTrue(
            np.array_equal(grid.decode(packed, (2, 3)), [[-1, 2, -7], [1, np.nan, 7]], equal_nan=True)
        )
        with self.assertRaises(oracle.FileError):
            grid.decode(packed | 0x10, (2, 3))
        codes = np.array([[0x00, 0x01, 0x7E, 0xFE, 0x7F, 0xFF, 0x80]], dtype="u1")
        e4m3 = oracle.Grid({"format": "fp8_e4m3"}).decode(codes, codes.shape)[0]
        self.assertTrue(np.array_equal(e4m3, [0, 2.0**-9, 448, -448] + 3 * [np.nan], equal_nan=True))

    def test_rounding_takes_the_nearest_or_the_drawn_neighbour(self):
        rng = np.random.default_rng(6)
        for name, values in oracle.MAGNITUDES.items():
            if name == "bf16":
                continue
            grid = oracle.Grid({"format": name})
            both = np.concatenate([-values[:0:-1], values])
            z = rng.uniform(-1, 1, 400) * values[-1] * 2.0 ** rng.integers(-8, 1, 400)
            near = grid.rounded(z)
            distance = np.abs(z[:, None] - both)
            self.assertTrue(np.array_equal(np.abs(z - near), distance.min(axis=1)), name)
            ties = (values[:-1] + values[1:]) / 2
            even = np.where(np.arange(len(ties)) % 2 == 0, values[:-1], values[1:])
            self.assertTrue(np.array_equal(grid.rounded(-ties), -even), name)
            # The mean of all that u draws is z itself, to the spacing of the u.
            u = (np.arange(1000) + 0.5) / 1000
            mean = np.array([grid.rounded(np.full(1000, x), u).mean() for x in z[:50]])
            self.assertLess((np.abs(mean - z[:50]) / np.diff(values).max()).max(), 1e-3, name)
            one = np.ones(len(z))
            self.assertEqual(grid.excess(z[:, None], near[:, None], one).max(), 0)
            place, d = grid.cell(z)
            other = np.copysign(values[place + (d <= 0.5)], z)  # z is past the middle by half of the rest
            past = (np.abs(z - other) - np.abs(z - near)) / 2
            found = grid.excess(z[:, None], other[:, None], one)[:, 0]
            self.assertLess(np.abs(found - past).max(), 1e-12 * values[-1], name)

    def test_philox_has_the_published_words(self):
        ones = 0xFFFFFFFF
        for counter, key, words in (
            ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
            ([ones] * 4, (ones, ones), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ):
            self.assertEqual([int(w) for w in oracle.philox(counter, key)], words)

    def test_phi_moves_as_without_rounding(self):
        rng = np.random.default_rng(7)
        gradients = [{"w": rng.standard_normal((6, 9))} for _ in range(200)]
        start = {"w": rng.standard_normal((6, 9))}
        cosine = {"schedule": {"kind": "cosine", "warmup_steps": 20, "decay_steps": 200, "final": 0.1}}
        for decay, nesterov, (kind, rest, met) in itertools.product(
            (0.0, 0.5),
            (False, True),
            (("exact", {}, 1), ("exact_schedule", cosine, 1), ("exact", cosine, 0), ("blog", {}, 0)),
        ):
            rule = {"name": "sgd", "lr": 0.1, "weight_decay": decay, "nesterov": nesterov}
            eco = {"format": "int4", "residual": "momentum", "eco": {"kappa": kind}}
            group = {"match": "*", "rule": rule, "weights": eco, **rest}
            rounded = oracle.Replay([group], start, 200)
            free = oracle.Replay([{**group, "weights": {}}], rounded.weights)
            for g in gradients:
                rounded.step(g)
                free.step(g)
            s = oracle.returns(rounded.groups["w"], 201, 200)
            phi, want = (r.weights["w"] - s * r.state["w"]["momentum"] for r in (rounded, free))
            off = np.abs(phi - want).max()
            if met or (kind == "blog" and decay == 0):  # where both are one
                self.assertLess(off, 1e-12, (decay, nesterov, kind))
            else:
                self.assertGreater(off, 1e-3, (decay, nesterov, kind))

    def test_what_undoes_a_direction_keeps_all_of_the_error(self):
        rng = np.random.default_rng(8)
        recipe = {**oracle.LMO_DEFAULTS, "coefficients": "eco8", "iterations": 8}
        for shape in ((9, 17), (17, 9)):
            x, e = rng.standard_normal(shape), rng.standard_normal(shape)
            c = oracle.inverse_lmo(x, recipe, e)
            u, sigma, vt = np.linalg.svd(x, full_matrices=False)
            back = (u / sigma) @ u.T @ c if shape[0] < shape[1] else c @ (vt.T / sigma) @ vt
            # |p - 1| <= 7.26e-4 on [1e-3, 1]
            self.assertLess(np.linalg.norm(back - e), 1e-3 * np.linalg.norm(e), shape)


def direction_of(state, x, group):
    """One direction from a state that has not moved: momentum 0 makes X a multiple of x."""
    return oracle.direction(state, x, 1, group)


if __name__ == "__main__":
    unittest.main()
