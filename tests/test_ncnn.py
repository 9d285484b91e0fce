"Networks of ncnn: against spandrel's own architecture, layer by layer, and damaged files."
import pytest
import torch
import torch.nn.functional as F

from foundir_v2.core import FoundIRError
from foundir_v2.ncnn import HALF, LAYERS, read_layer, read_network


def packed(weight, bias=None, half=True):
    "A convolution's weights as ncnn writes them."
    data = weight.numpy().astype("<f2" if half else "<f4").tobytes()
    tagged = (HALF if half else 0).to_bytes(4, "little") + data + bytes(-len(data) % 4)
    return tagged if bias is None else tagged + bias.numpy().astype("<f4").tobytes()


def text(*lines): return "\n".join(["7767517", f"{len(lines)} 9", *lines]).encode()


def rrdb(state, blocks):
    "Real-ESRGAN's graph and weights from a state dict of the original names, written as ncnn's converter does."
    lines, data = ["Input in 0 1 data"], b""
    def conv(name, value, out, leaky=True):
        nonlocal data
        w, b = state[f"{name}.weight"], state[f"{name}.bias"]
        data += packed(w, b, half=False)
        end = " 9=2 -23310=1,2.000000e-01" if leaky else ""
        lines.append(f"Convolution {name} 1 1 {value} {out} 0={w.shape[0]} 1=3 4=1 5=1 6={w.numel()}{end}")
        return out
    def add(a, b, out, scale=0.2):
        lines.append(f"Eltwise {out} 2 1 {a} {b} {out} 0=1 -23301=2,{scale},1.0")
        return out
    x = first = conv("conv_first", "data", "first", leaky=False)
    for n in range(blocks):
        whole = x
        for r in (1, 2, 3):
            parts, name = [x], f"body.{n}.rdb{r}"
            for k in range(1, 6):
                joined = parts[0]
                if k > 1:
                    joined = f"{name}.in{k}"
                    lines.append(f"Concat {joined} {k} 1 {' '.join(parts)} {joined} 0=0")
                parts.append(conv(f"{name}.conv{k}", joined, f"{name}.out{k}", leaky=k < 5))
            x = add(parts[-1], x, f"{name}.sum")
        x = add(x, whole, f"body.{n}.sum")
    lines.append(f"BinaryOp sum 2 1 {first} {conv('conv_body', x, 'body', leaky=False)} sum")
    x = "sum"
    for name in ("conv_up1", "conv_up2"):
        lines.append(f"Interp {name}.large 1 1 {x} {name}.large 0=1 1=2.000000e+00 2=2.000000e+00")
        x = conv(name, f"{name}.large", f"{name}.out")
    conv("conv_last", conv("conv_hr", x, "hr"), "output", leaky=False)
    return text(*lines), data


def test_the_same_picture_as_spandrel():
    from spandrel.architectures.ESRGAN import ESRGANArch
    torch.manual_seed(0)
    plain, shapes = {}, dict(conv_first=(3, 8), conv_body=(8, 8), conv_up1=(8, 8), conv_up2=(8, 8), conv_hr=(8, 8),
                             conv_last=(8, 3))
    for n in range(2):
        for r in (1, 2, 3):
            for k in range(1, 6): shapes[f"body.{n}.rdb{r}.conv{k}"] = (8 + 32 * (k - 1), 8 if k == 5 else 32)
    for name, (into, out) in shapes.items():
        plain |= {f"{name}.weight": torch.randn(out, into, 3, 3) / into**0.5 / 3, f"{name}.bias": torch.randn(out) / 9}
    theirs = ESRGANArch().load(dict(plain)).model.eval()
    ours, x = read_network(*rrdb(plain, 2)), torch.rand(1, 3, 9, 7)
    with torch.no_grad(): torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)


def test_layers():
    x, weight = torch.randn(1, 4, 5, 6), torch.randn(2, 4, 3, 3)
    conv = LAYERS["Convolution"](x, read_layer("Convolution c 1 1 a b 0=2 1=3 3=2 4=1 6=72 9=1").parameters, [weight])
    torch.testing.assert_close(conv, F.conv2d(x, weight, stride=2, padding=1).relu())
    assert torch.equal(LAYERS["PixelShuffle"](x, {0: 2}, []), F.pixel_shuffle(x, 2))
    assert torch.equal(LAYERS["PReLU"](x, {0: 4}, [torch.full((4,), 0.5)]), torch.where(x > 0, x, x / 2))
    assert torch.equal(LAYERS["BinaryOp"](x, x, {0: 1}, []), torch.zeros_like(x))
    assert torch.equal(LAYERS["Concat"](x, x, {0: 1}, []), torch.cat([x, x], 2))
    assert LAYERS["Interp"](x, {0: 2, 1: 0.5, 2: 2.0}, []).shape == (1, 4, 2, 12)
    with pytest.raises(ValueError): LAYERS["Eltwise"](x, x, {0: 0}, [])


@pytest.mark.parametrize("half, tolerance", [(True, 1e-3), (False, 0)])
def test_both_precisions(half, tolerance):
    weight, x = torch.randn(1, 1, 3, 1), torch.rand(1, 1, 5, 5)  # three halves need two more bytes
    p = text("Input in 0 1 data", "Convolution c 1 1 data out 0=1 1=1 11=3 5=1 6=3")
    found = read_network(p, packed(weight, torch.zeros(1), half))(x)
    torch.testing.assert_close(found, F.conv2d(x, weight), atol=tolerance, rtol=tolerance or 1e-6)


GOOD = text("Input in 0 1 data", "Convolution c 1 1 data out 0=2 1=1 5=1 6=2")
DATA = packed(torch.ones(2, 1, 1, 1), torch.zeros(2))


@pytest.mark.parametrize("param, data, words", [
    (GOOD, DATA[:-1], "too few"), (GOOD, DATA + b"1234", "too many"), (GOOD, b"abcd" + DATA[4:], "unknown tag"),
    (GOOD.replace(b"6=2", b"6=3"), DATA, "can't use"), (GOOD.replace(b"6=2", b"6=-2"), DATA, "too few"),
    (GOOD.replace(b"0=2", b"0=x"), DATA, "can't use"), (GOOD.replace(b" 5=1", b" 5=1 7"), DATA, "can't use"),
    (GOOD.replace(b"Convolution", b"Shell"), DATA, "layers Shell"),
    (GOOD.replace(b"data out", b"date out"), DATA, "date"),
    (GOOD.replace(b"7767517", b"1"), DATA, "text"), (b"", b"", "can't use"), (b"\xff\xfe", b"", "can't use")])
def test_damaged_files_cost_one_line(param, data, words):
    with pytest.raises(FoundIRError, match=words) as e: read_network(param, data)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_what_cannot_be_computed_names_the_layer():
    with pytest.raises(FoundIRError, match="layer c"): read_network(GOOD, DATA)(torch.zeros(1, 3, 4, 4))


def test_numbers_are_read_as_written():
    assert read_layer("Eltwise i 1 1 a b 0=1 -23301=2,0.5,1").parameters == {0: 1, 1: [0.5, 1.0]}
    for line in ("Interp", "Interp i 2 1 a b", "Interp i -1 2 a b"):
        with pytest.raises(ValueError): read_layer(line)
