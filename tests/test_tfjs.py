"Graphs of TensorFlow.js: every operation against NumPy, damaged files, and MAXIM against its own package."
import base64, io, json, math

import numpy as np
import pytest
import torch
from PIL import Image

from foundir_v2.core import FoundIRError, from_pil
from foundir_v2.published import is_cached, read_release
from foundir_v2.tfjs import ELEMENTWISE, OPERATIONS, Node, attribute, read_graph, strided_slice

RNG = np.random.default_rng(0)
F32, I32 = np.float32, np.int32
A, B = RNG.normal(size=(2, 3, 4)).astype(F32), RNG.normal(size=(3, 1)).astype(F32)
POSITIVE, INTS = np.abs(A) + F32(0.1), RNG.integers(-9, 9, (2, 5)).astype(I32)


def written(value):
    "An attribute as the graph's JSON has it."
    if isinstance(value, bool): return {"b": value}
    if isinstance(value, int): return {"i": str(value)}
    if isinstance(value, list): return {"list": {"i": [str(v) for v in value]}}
    if value.startswith("DT_"): return {"type": value}
    return {"s": base64.b64encode(value.encode()).decode()}


def model(nodes, weights, end):
    listed = [dict(name=n, dtype=str(w.dtype), shape=list(w.shape)) for n, w in weights.items()]
    made = dict(modelTopology=dict(node=nodes), signature=dict(outputs=dict(y=dict(name=f"{end}:0"))),
                weightsManifest=[dict(paths=["a.bin", "b.bin"], weights=listed)])
    data = b"".join(w.tobytes() for w in weights.values())
    return json.dumps(made).encode(), {"a.bin": data[:7], "b.bin": data[7:]}


def one(op, *inputs, **attributes):
    "A graph of one operation, its inputs constants, computed."
    weights = {f"in{i}": x for i, x in enumerate(inputs)}
    nodes = [dict(name="end", op=op, input=list(weights), attr={k: written(v) for k, v in attributes.items()}),
             *(dict(name=n, op="Const") for n in weights)]
    return read_graph(*model(nodes, weights, "end"))(torch.zeros(1)).numpy()


def numbers(*values): return np.array(values, I32)


def convolved(x, kernel, stride, same):
    "A convolution by its definition."
    (h, w), (kh, kw) = x.shape[1:3], kernel.shape[:2]
    if same:
        pads = [max(0, (math.ceil(n / stride) - 1) * stride + k - n) for n, k in ((h, kh), (w, kw))]
        x = np.pad(x, [(0, 0), *((p // 2, p - p // 2) for p in pads), (0, 0)])
        h, w = x.shape[1:3]
    rows, columns = range(0, h - kh + 1, stride), range(0, w - kw + 1, stride)
    return np.array([[[np.tensordot(b[i:i + kh, j:j + kw], kernel, 3) for j in columns] for i in rows] for b in x])


PICTURE, KERNEL = RNG.normal(size=(2, 6, 7, 3)).astype(F32), RNG.normal(size=(3, 2, 3, 4)).astype(F32)
PLAIN = dict(strides=[1, 1, 1, 1], dilations=[1, 1, 1, 1])
SLICES = dict(begin_mask=0, end_mask=0, shrink_axis_mask=0, ellipsis_mask=0, new_axis_mask=0)
CASES = [
    ("Identity", (A,), {}, A), ("AddV2", (A, B), {}, A + B), ("Sub", (A, B), {}, A - B), ("Mul", (A, B), {}, A * B),
    ("RealDiv", (A, B), {}, A / B), ("Neg", (A,), {}, -A), ("FloorDiv", (INTS, numbers(4)), {}, INTS // 4),
    ("FloorMod", (INTS, numbers(4)), {}, INTS % 4), ("Maximum", (A, B), {}, np.maximum(A, B)),
    ("Minimum", (A, B), {}, np.minimum(A, B)), ("Square", (A,), {}, A**2), ("Reciprocal", (A,), {}, 1 / A),
    ("Rsqrt", (POSITIVE,), {}, POSITIVE**-0.5), ("Exp", (A,), {}, np.exp(A)), ("Tanh", (A,), {}, np.tanh(A)),
    ("Abs", (A,), {}, np.abs(A)), ("Sign", (INTS,), {}, np.sign(INTS)), ("Floor", (A,), {}, np.floor(A)),
    ("Less", (A, B), {}, A < B), ("LessEqual", (INTS, INTS), {}, INTS <= INTS), ("Greater", (A, B), {}, A > B),
    ("GreaterEqual", (A, B), {}, A >= B), ("NotEqual", (INTS, numbers(3)), {}, INTS != 3),
    ("Shape", (A,), {}, numbers(2, 3, 4)), ("Reshape", (A, numbers(4, -1)), {}, A.reshape(4, -1)),
    ("BroadcastTo", (B, numbers(2, 3, 4)), {}, np.broadcast_to(B, (2, 3, 4))),
    ("Transpose", (A, numbers(2, 0, 1)), {}, A.transpose(2, 0, 1)),
    ("ExpandDims", (A, numbers(-1)), {}, A[..., None]), ("Squeeze", (B,), dict(squeeze_dims=[-1]), B[:, 0]),
    ("Pack", (A, A + 1), dict(axis=1, N=2), np.stack([A, A + 1], 1)),
    ("ConcatV2", (A, A, numbers(-1)), dict(N=2), np.concatenate([A, A], -1)),
    ("Range", (numbers(2), numbers(11), numbers(3)), {}, numbers(2, 5, 8)),
    ("Cast", (A * 3,), dict(DstT="DT_INT32", SrcT="DT_FLOAT"), (A * 3).astype(I32)),
    ("StridedSlice", (A, numbers(0, 0, 1), numbers(1, 3, -1), numbers(1, 2, 1)),
     SLICES | dict(shrink_axis_mask=1), A[0, 0:3:2, 1:-1]),
    ("StridedSlice", (A, numbers(1, 2, 3), numbers(1, 2, 3), numbers(1, 1, 1)),
     SLICES | dict(begin_mask=5, end_mask=6), A[:1, 2:, :]),
    ("GatherV2", (A, numbers(2, 0, 2, 1).reshape(2, 2), numbers(1)), dict(batch_dims=0),
     np.take(A, [[2, 0], [2, 1]], 1)),
    ("Sum", (A, numbers(0, 2)), dict(keep_dims=False), A.sum((0, 2))),
    ("Sum", (A, numbers(-1)), dict(keep_dims=True), A.sum(-1, keepdims=True)),
    ("Einsum", (PICTURE, B.repeat(2, 1)), dict(equation="abcg,gf->abcf"),
     np.einsum("abcg,gf->abcf", PICTURE, B.repeat(2, 1))),
    ("Conv2D", (PICTURE, KERNEL), PLAIN | dict(padding="VALID"), convolved(PICTURE, KERNEL, 1, False)),
    ("Conv2D", (PICTURE, KERNEL), PLAIN | dict(padding="SAME"), convolved(PICTURE, KERNEL, 1, True)),
    ("Conv2D", (PICTURE, KERNEL), PLAIN | dict(padding="SAME", strides=[1, 2, 2, 1]),
     convolved(PICTURE, KERNEL, 2, True))]


@pytest.mark.parametrize("op, inputs, attributes, expected", CASES, ids=[c[0] for c in CASES])
def test_an_operation(op, inputs, attributes, expected):
    found = one(op, *(x if x.ndim and x.size > 1 or op in ("BroadcastTo", "Sum") else x.reshape(()) for x in inputs),
                **attributes)
    assert found.shape == expected.shape and (found.dtype == bool) == (expected.dtype == bool)
    assert (found.dtype.kind == "i") == (expected.dtype.kind == "i")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_operations_of_truth():
    "Booleans come from comparisons only: no weights are."
    nodes = [dict(name="x", op="Placeholder"), dict(name="zero", op="Const"), dict(name="one", op="Const"),
             dict(name="above", op="Greater", input=["x", "zero"]), dict(name="below", op="Less", input=["x", "one"]),
             dict(name="both", op="LogicalAnd", input=["above", "below"], attr={}),
             dict(name="y", op="SelectV2", input=["both", "x", "one"])]
    y = read_graph(*model(nodes, dict(zero=F32(0), one=F32(1)), "y"))(torch.tensor([-1., 0.25, 3.]))
    assert y.tolist() == [1, 0.25, 1]


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_transposed_convolution_is_the_adjoint(padding, stride):
    attributes = dict(padding=padding, strides=[1, stride, stride, 1], dilations=[1, 1, 1, 1])
    y = one("Conv2D", PICTURE, KERNEL, **attributes)
    other = RNG.normal(size=y.shape).astype(F32)
    back = one("Conv2DBackpropInput", numbers(*PICTURE.shape), KERNEL, other, **attributes)
    assert back.shape == PICTURE.shape
    assert (y * other).sum() == pytest.approx((PICTURE * back).sum(), rel=1e-3, abs=1e-3)


def test_every_operation_is_tested():
    elsewhere = {"LogicalAnd", "SelectV2", "Conv2DBackpropInput"}
    assert {c[0] for c in CASES} | elsewhere == {*ELEMENTWISE, *OPERATIONS}


def test_what_a_graph_holds_besides():
    "Nodes in any order, what only has to come first, names with an output's number, and parts that nothing needs."
    nodes = [dict(name="y", op="AddV2", input=["twice:0", "x", "^never"]), dict(name="x", op="Placeholder"),
             dict(name="twice", op="Mul", input=["x", "two"]), dict(name="two", op="Const"),
             dict(name="never", op="PyFunc", input=["x"])]
    graph = read_graph(*model(nodes, dict(two=F32(2)), "y"))
    assert graph(torch.tensor([1., 2.])).tolist() == [3, 6] and len(graph.nodes) == 4
    assert graph(torch.tensor([5.])).tolist() == [15]  # nothing is left of the last picture


def test_masks_that_no_network_here_uses_are_refused():
    one_by_one = torch.tensor([0]), torch.tensor([1]), torch.tensor([1])
    with pytest.raises(ValueError, match="mask"): strided_slice(torch.zeros(3), *one_by_one, dict(ellipsis_mask=1))


SUM = [dict(name="y", op="AddV2", input=["x", "w"]), dict(name="x", op="Placeholder"), dict(name="w", op="Const")]


@pytest.mark.parametrize("damage, words", [
    (lambda m: m["weightsManifest"][0]["weights"][0].update(shape=[4]), "too few bytes"),
    (lambda m: m["weightsManifest"][0]["weights"][0].update(shape=[2]), "4 bytes of weights too many"),
    (lambda m: m["weightsManifest"][0]["weights"][0].update(shape=[-1, -3]), "weights w"),
    (lambda m: m["weightsManifest"][0]["weights"][0].update(shape=[10**30]), "too few bytes"),
    (lambda m: m["weightsManifest"][0]["weights"][0].update(dtype="string"), "string"),
    (lambda m: m["weightsManifest"][0]["weights"][0].update(quantization={"scale": 1}), "weights w"),
    (lambda m: m["weightsManifest"][0].update(paths=["../secret"]), "secret"),
    (lambda m: m["modelTopology"]["node"][0].update(op="eval"), "operations eval"),
    (lambda m: m["modelTopology"]["node"][0].update(input=["x", "y"]), "loop"),
    (lambda m: m["modelTopology"]["node"][0].update(input=["x", "lost"]), "lost"),
    (lambda m: m["modelTopology"]["node"][0].update(attr={"a": {"s": "%%"}}), "can't use"),
    (lambda m: m["modelTopology"].update(node=3), "can't use"),
    (lambda m: m["weightsManifest"][0].update(weights=[]), "12 bytes of weights too many"),
    (lambda m: m.pop("signature"), "signature"),
    (lambda m: m["signature"].update(outputs={}), "can't use")])
def test_a_damaged_graph_costs_one_line(damage, words):
    text, shards = model(SUM, dict(w=np.ones(3, F32)), "y")
    loaded = json.loads(text)
    damage(loaded)
    with pytest.raises(FoundIRError, match=words) as e: read_graph(json.dumps(loaded).encode(), shards)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize("text", [b"", b"[" * 100_000, b"\xff", b"{}", b"null"])
def test_other_files_are_no_graph(text):
    with pytest.raises(FoundIRError): read_graph(text, {})


def test_what_cannot_be_computed_names_the_node():
    graph = read_graph(*model(SUM, dict(w=np.ones(3, F32)), "y"))
    with pytest.raises(FoundIRError, match=r"AddV2 y on a picture of shape \(2,\)"): graph(torch.zeros(2))


def test_attributes():
    assert [attribute(written(v)) for v in (3, [1, -2], "SAME", True)] == [3, [1, -2], "SAME", True]
    assert attribute({"list": {}}) == [] and attribute({"tensor": {}}) is None
    assert Node(dict(name="n", op="Const", attr={"value": {"tensor": {}}, "dtype": {"type": "DT_INT32"}})).attributes \
        == {"dtype": torch.int32}


@pytest.mark.skipif(not is_cached("maxim-denoising"), reason="maxim-denoising isn't fetched (make networks)")
def test_maxim_gives_its_own_package_s_picture():
    files = read_release("maxim-denoising", "package/*")
    given, theirs = (from_pil(Image.open(io.BytesIO(files[f"package/assets/{n}.png"]))) for n in ("fixture", "result"))
    shards = {p.rpartition("/")[2]: data for p, data in files.items() if p.endswith(".bin")}
    graph = read_graph(files["package/models/model.json"], shards)
    ours = graph(given.permute(1, 2, 0)[None])[0].permute(2, 0, 1).clamp(0, 1)
    psnr = lambda x: -10 * torch.log10((x - theirs).square().mean()).item()
    assert psnr(given) < 20 < 50 < psnr(ours)
    assert psnr((ours * 255).floor() / 255) > 80  # the package cuts to 8 bits downwards
