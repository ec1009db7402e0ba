"""The oracle against itself: two ways to the same number, and the published error tables."""

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


def direction_of(state, x, group):
    """One direction from a state that has not moved: momentum 0 makes X a multiple of x."""
    return oracle.direction(state, x, 1, group)


if __name__ == "__main__":
    unittest.main()
