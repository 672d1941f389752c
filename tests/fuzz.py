"""Garbage for every op, forward and backward: only TypeError, ValueError and RuntimeError may come out.

python tests/fuzz.py SEED CALLS
"""

import collections
import faulthandler
import random
import resource
import sys
import warnings

import torch

import wsss_kernels as wk

faulthandler.enable()
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))  # some of the shapes are large on purpose
warnings.simplefilter("ignore")
seed, calls = int(sys.argv[1]), int(sys.argv[2])
draw = random.Random(seed)
torch.manual_seed(seed)
nan, inf = float("nan"), float("inf")
DTYPES = [torch.float32] * 24 + [
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.complex128,
]
FILLS = [nan, inf, -inf, 0.0, 1e38, -1e38, 1e-40, -1.0]
KINDS = [
    lambda x: x.to_sparse(),
    lambda x: x.to_mkldnn(),
    torch.nn.Parameter,
    lambda x: x.numpy(),
    lambda x: x.tolist(),
    torch._neg_view,
    lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    lambda x: torch.nested.nested_tensor([x]),
]
NUMBERS = [
    0,
    1,
    2,
    3,
    5,
    8,
    -1,
    -5,
    16,
    17,
    -(10**9),
    2**31,
    2**63,
    2**64,
    10**400,
    -(2**63),
    0.0,
    -0.0,
    0.5,
    1.5,
    1e-9,
    1e-300,
    5e-324,
    1e39,
    1e300,
    nan,
    inf,
    -inf,
    -1e-9,
    True,
    False,
    None,
    "5",
    "auto",
    "",
    b"l1",
    [5],
    (5,),
    {},
    object(),
    1j,
    torch.tensor(5),
    torch.tensor(0.5),
    torch.float32,
]
WORDS = ["", "AUTO", "l1 ", None, 0, 1.0, [], b"full", chr(0), "x" * 10000, torch.tensor(1), True]


def tensor(size=None):
    if size is None:
        rank = draw.choice([4] * 40 + [0, 1, 2, 3, 5, 6])
        size = [draw.choice([0, 1, 1, 2, 3, 4, 7, 9, 17]) for _ in range(rank)]
    dtype, kind = draw.choice(DTYPES), draw.randrange(12)
    if kind == 0:
        return torch.empty(size, device="meta")
    x = torch.rand(size) if draw.random() < 0.8 else torch.full(size, draw.choice(FILLS))
    x = x.to(dtype)
    if kind == 1 and x.dim() >= 2:
        return x.mT
    if kind == 2 and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if kind == 3 and dtype == torch.float32 and x.numel() < 10**6:
        return draw.choice(KINDS)(x)
    if kind == 4 and x.dim() and x.shape[0]:
        return x[:1].expand(x.shape)
    if kind == 5 and dtype.is_floating_point and dtype.itemsize > 1:
        return x.requires_grad_()
    if kind == 6 and dtype in (torch.float32, torch.float64):
        return x.requires_grad_() * 1
    if kind == 7:
        return torch.zeros(1, dtype=dtype).expand(draw.choice([10**3, 10**5, 2**31, 2**40]), 0, *size[:2])
    return x


def some(**options):  # name = (share of the calls, value)
    few = draw.choice([0.1, 1])
    return {name: value for name, (share, value) in options.items() if share == 1 or draw.random() < few * share}


def word(*good):
    return draw.choice(list(good) * 6 + WORDS)


def affinity_call():
    radius = [draw.choice(NUMBERS)] if draw.random() < 0.3 else []
    return wk.local_affinity(
        tensor(),
        *radius,
        **some(
            metric=(0.5, word("l1", "cosine")),
            scale=(0.5, draw.choice([draw.choice(NUMBERS), 1.0, "auto"])),
            border=(0.5, word("full", "cropped")),
            nonsense=(0.02, 1),
        ),
    )


def boundary_call():
    x = tensor()
    if isinstance(x, torch.Tensor) and not x.is_nested and x.dim() == 4 and draw.random() < 0.8:
        x = x[:, :1]
    return wk.boundary_affinity(
        x,
        *([draw.choice(NUMBERS)] if draw.random() < 0.3 else []),
        **some(radius=(0.1, draw.choice(NUMBERS)), nonsense=(0.02, 1)),
    )


def walk_call():
    maps, radius, affinity = tensor(), draw.choice([1, 2, 3, 5, 5, 5, 10]), None
    if isinstance(maps, torch.Tensor) and not maps.is_nested and maps.dim() == 4 and draw.random() < 0.9:
        affinity = tensor([min(maps.shape[0], 1000), len(wk.neighbour_offsets(radius)), *maps.shape[2:]])
    steps = draw.choice([1, 3, 30, 300] + [n for n in NUMBERS if type(n) is not int or abs(n) < 1000 or n >= 2**31])
    return wk.random_walk(
        maps,
        tensor() if affinity is None else affinity,
        **some(
            radius=(1, draw.choice([radius] * 9 + [draw.choice(NUMBERS)])),
            beta=(0.3, draw.choice(NUMBERS)),
            steps=(1, steps),
            solver=(0.5, word("power", "chebyshev", "auto")),
            tol=(0.3, draw.choice(NUMBERS)),
        ),
    )


def attention_call():
    maps, attention = tensor(), None
    if isinstance(maps, torch.Tensor) and not maps.is_nested and maps.dim() == 4 and draw.random() < 0.9:
        n = min(maps.shape[2] * maps.shape[3], 400)
        attention = tensor([min(maps.shape[0], 1000), n, n])
    return wk.attention_walk(
        maps,
        tensor() if attention is None else attention,
        **some(
            sinkhorn=(0.4, draw.choice([0, 1, 5, *NUMBERS[6:8], *NUMBERS[16:]])),
            squarings=(0.4, draw.choice(NUMBERS)),
            box_threshold=(0.4, draw.choice([None, 0.2, *NUMBERS])),
        ),
    )


def vote_call():
    maps, segments = tensor(), tensor()
    if isinstance(maps, torch.Tensor) and not maps.is_nested and maps.dim() == 4 and draw.random() < 0.9:
        size = [min(maps.shape[0], 1000), *maps.shape[2:]]
        segments = torch.randint(-3, 9, size).to(draw.choice([torch.int64, torch.int32, torch.uint8, torch.bool]))
        if draw.random() < 0.4:
            segments = [torch.rand(draw.choice([0, 1, 5]), *size[1:]) > 0.5 for _ in range(size[0])]
    return wk.mask_vote(maps, segments, **some(reduce=(0.5, word("mean", "max"))))


def like(x, *shape):
    """A tensor that fits x where x is a map, mostly."""
    if isinstance(x, torch.Tensor) and not x.is_nested and x.dim() == 4 and draw.random() < 0.9:
        batch, channels, height, width = x.shape
        if max(batch, 1) * max(channels, 1) * height * width < 10**6 and batch < 10**4:
            return tensor([size(batch, channels, height, width) if callable(size) else size for size in shape])
    return tensor()


def batch(b, c, h, w):
    return b


def columns(b, c, h, w):
    return w


def rows(b, c, h, w):
    return h


def channels(b, c, h, w):
    return c


def integers(x):
    if isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_quantized and draw.random() < 0.9:
        return (5 * x.detach().float().nan_to_num(0).clamp(-1, 1)).to(
            draw.choice([torch.int64, torch.int32, torch.uint8])
        )
    return x


def adaptive_call():
    maps = tensor()
    return wk.pixel_adaptive(
        like(maps, batch, 3, rows, columns),
        maps,
        **some(
            dilations=(0.4, draw.choice([(1, 2), (1,), [3, 100], *NUMBERS])),
            variant=(0.5, word("pamr", "par")),
            iterations=(1, draw.choice([0, 1, 2, 3] * 9 + [n for n in NUMBERS if type(n) is not int or abs(n) < 100])),
        ),
    )


def crf_call():
    unary = tensor()
    return wk.dense_crf(
        like(unary, batch, 3, rows, columns),
        unary,
        **some(
            iterations=(1, draw.choice([0, 1, 2, 3] * 9 + [n for n in NUMBERS if type(n) is not int or abs(n) < 100])),
            gaussian=(0.3, draw.choice([(1, 3), (3.0, 3.0), (0, 1), (draw.choice(NUMBERS), 3), *NUMBERS])),
            bilateral=(
                0.3,
                draw.choice(
                    [
                        (80, 13, 10),
                        (5.0, 3.0, 0),
                        (80, draw.choice(NUMBERS), 10),
                        (draw.choice(NUMBERS), 1, 1),
                        *NUMBERS,
                    ]
                ),
            ),
        ),
    )


def energy_call():
    probs = tensor()
    return wk.dense_energy_loss(
        like(probs, batch, 3, rows, columns),
        probs,
        **some(
            roi=(0.4, like(probs, batch, rows, columns)),
            sigma_rgb=(0.3, draw.choice(NUMBERS)),
            sigma_xy=(0.3, draw.choice(NUMBERS)),
        ),
    )


def loss_call():
    radius = draw.choice([2, 3, 5])
    affinity = tensor([draw.choice([0, 1, 2]), len(wk.neighbour_offsets(radius)), draw.choice([1, 7]), 9])
    return wk.affinity_loss(
        affinity,
        integers(like(affinity, batch, rows, columns)),
        **some(
            radius=(1, draw.choice([radius] * 9 + NUMBERS)),
            border=(0.5, word("full", "cropped")),
            ignore_index=(0.3, draw.choice(NUMBERS)),
        ),
    )


def features_loss_call():
    feats = tensor()
    return wk.affinity_loss_from_features(
        feats,
        integers(like(feats, batch, rows, columns)),
        **some(
            radius=(0.4, draw.choice(NUMBERS)),
            metric=(0.4, word("l1", "cosine")),
            scale=(0.4, draw.choice(NUMBERS)),
            border=(0.5, word("full", "cropped")),
        ),
    )


def histogram_call():
    feats = tensor()
    return wk.soft_histogram(
        feats, like(feats, draw.choice([0, 1, 5, 40]), channels), **some(temperature=(0.4, draw.choice(NUMBERS)))
    )[0]


def pyramid_call():
    return wk.hspp(
        tensor(),
        **some(levels=(0.5, draw.choice([(1, 2), [4], (), (0,), (1, 9), *NUMBERS])), gamma=(0.4, draw.choice(NUMBERS))),
    )


def memory_call():
    query = tensor()
    keys = like(query, *draw.choice([(channels, 6, columns), (batch, channels, 6, columns)]))
    values = torch.rand(keys.shape) if isinstance(keys, torch.Tensor) and keys.numel() < 10**6 else keys
    options = some(mask=(0.5, torch.rand(draw.choice([1, 2, 3]), 6) < 0.5), scale=(0.3, draw.choice(NUMBERS)))
    if draw.random() < 0.3:
        return wk.attention_entropy(query, keys, **options)
    return wk.cross_image_attention(
        query, keys, values, **options, **some(top_k=(0.3, draw.choice(NUMBERS)), threshold=(0.3, draw.choice(NUMBERS)))
    )


def context_call():
    feats = tensor()
    return wk.class_context(
        feats,
        like(feats, batch, 4, rows, columns),
        threshold=draw.choice([0.5] * 9 + NUMBERS),
        **some(assign=(0.4, integers(like(feats, batch, rows, columns)))),
    )[0]


def kmeans_call():
    x = tensor([draw.choice([0, 1, 5, 30]), draw.choice([0, 1, 3])]) if draw.random() < 0.8 else tensor()
    return wk.kmeans(
        [x, x] if draw.random() < 0.2 else x,
        draw.choice([1, 2, 5] * 9 + NUMBERS),
        **some(
            iterations=(0.4, draw.choice([1, 2, 9, *NUMBERS[13:]])),
            tol=(0.3, draw.choice(NUMBERS)),
            init=(0.4, draw.choice(["k-means++", tensor(), x, *WORDS])),
            seed=(0.2, draw.choice(NUMBERS)),
            n_init=(0.3, draw.choice([1, 2, 3, *NUMBERS[16:]])),
        ),
    )


CALLS = [
    affinity_call,
    walk_call,
    boundary_call,
    attention_call,
    vote_call,
    adaptive_call,
    crf_call,
    energy_call,
    loss_call,
    features_loss_call,
    histogram_call,
    pyramid_call,
    memory_call,
    context_call,
    kmeans_call,
]
raised, done = collections.Counter(), collections.Counter()
for _ in range(calls):
    make = draw.choice(CALLS)
    try:
        if draw.random() < 0.05:
            wk.neighbour_offsets(draw.choice(NUMBERS))
        out = make()
        if isinstance(out, torch.Tensor) and out.requires_grad and out.device.type == "cpu":
            out.backward(torch.rand(out.shape).to(out.dtype))
        done[make.__name__] += 1
    except (TypeError, ValueError, RuntimeError):
        raised[make.__name__] += 1
for make in CALLS:
    print(make.__name__, "raised", raised[make.__name__], "done", done[make.__name__])
    assert min(raised[make.__name__], done[make.__name__]) > calls // 2500, make.__name__
