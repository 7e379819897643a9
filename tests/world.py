"""fastcnn.convert against the world: the CNNs of torchvision and timm, each converted and compared with what it was.

tests/test_world.py asks it of every model; `python tests/world_table.py` makes a table of it.
"""

import collections
import copy
import math
import statistics
from dataclasses import dataclass

import torch
from torch import nn

import fastcnn
from fastcnn.benchmarks import networks
from fastcnn.testing import make_grad

# by family: the smallest member and those with parts of their own; name@pixels, 64 where none are given
TORCHVISION = {
    "alexnet": "alexnet",
    "convnext": "convnext_tiny convnext_small convnext_base convnext_large",
    "densenet": "densenet121 densenet161 densenet169 densenet201",
    "efficientnet": """efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5
        efficientnet_b6 efficientnet_b7 efficientnet_v2_s efficientnet_v2_m efficientnet_v2_l""",
    "googlenet": "googlenet",
    "inception": "inception_v3@299",
    "maxvit": "maxvit_t@224",
    "mnasnet": "mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3",
    "mobilenetv2": "mobilenet_v2",
    "mobilenetv3": "mobilenet_v3_small mobilenet_v3_large",
    "regnet": """regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf regnet_x_16gf regnet_x_32gf
        regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf regnet_y_32gf""",
    "resnet": """resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d resnext101_64x4d
        wide_resnet50_2 wide_resnet101_2""",
    "shufflenetv2": "shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0",
    "squeezenet": "squeezenet1_0 squeezenet1_1",
    "swin_transformer": "swin_t swin_v2_t",
    "vgg": "vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn",
    "vision_transformer": "vit_b_32@224",
}
TIMM = {
    "byoanet": """lambda_resnet26t@128 halonet26t@256 botnet26t_256@256 eca_halonext26ts@256 sehalonet33ts@256
        haloregnetz_b@224""",
    "byobnet": """test_byobnet mobileone_s0 mobileone_s1 gernet_s repvgg_a0 repvgg_b1g4 regnetz_b16 regnetz_b16_evos
        regnetz_c16 resnext26ts eca_resnext26ts seresnext26ts gcresnext26ts bat_resnext26ts@256 resnet32ts resnet51q
        resnet50_clip_gap resnet50_mlp regnetz_d8""",
    "coat": "coat_lite_tiny@224",
    "convmixer": "convmixer_768_32 convmixer_1024_20_ks9_p14@112",
    "convnext": """test_convnext test_convnext2 test_convnext3 convnext_atto convnext_atto_ols convnext_atto_rms
        convnext_zepto_rms convnextv2_atto convnext_tiny_hnf""",
    "cpubone": "cpubone_nano",
    "csatv2": "csatv2@512",
    "cspnet": """cs3darknet_focus_s cs3darknet_s darknet17 sedarknet21 cspresnext50 cspresnet50d cs3sedarknet_l
        cspdarknet53 darknetaa53 cs3edgenet_x""",
    "cspnext": "cspnext_tiny",
    "densenet": "densenet121 densenetblur121d",
    "dla": "dla34 dla46_c dla46x_c dla60x_c dla60_res2net dla60_res2next",
    "dpn": "dpn48b dpn68 dpn68b",
    "edgenext": "edgenext_xx_small edgenext_small_rw",
    "efficientformer": "efficientformer_l1@224",
    "efficientformer_v2": "efficientformerv2_s0@224",
    "efficientnet": """test_efficientnet test_efficientnet_gn test_efficientnet_ln test_efficientnet_evos
        mobilenetv1_100 mobilenetv1_100h mobilenetv2_035 mobilenetv2_050 mobilenetv2_110d mobilenet_edgetpu_100
        mobilenet_edgetpu_v2_xs mnasnet_small semnasnet_050 spnasnet_100 fbnetc_100 tinynet_e mixnet_s tf_mixnet_s
        efficientnet_lite0 tf_efficientnet_lite0 efficientnet_b0 efficientnet_b0_gn efficientnet_b0_g8_gn
        efficientnet_b0_g16_evos efficientnet_blur_b0 tf_efficientnet_b0 efficientnet_es tf_efficientnet_es
        efficientnet_cc_b0_4e efficientnet_x_b3 efficientnet_b1_pruned efficientnetv2_rw_t
        gc_efficientnetv2_rw_t tf_efficientnetv2_b0""",
    "efficientvim": "efficientvim_m1@128",
    "efficientvit_mit": "efficientvit_b0 efficientvit_l1",
    "efficientvit_msra": "efficientvit_m0@224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8 fastvit_sa12 fastvit_mci0",
    "focalnet": "focalnet_tiny_srf",
    "ghostnet": "ghostnet_050 ghostnetv2_100 ghostnetv3_050",
    "hardcorenas": "hardcorenas_a",
    "hgnet": "hgnetv2_b0 hgnet_tiny",
    "hrnet": "hrnet_w18_small hrnet_w18_ssld",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2@128",
    "inception_v3": "inception_v3@128",
    "inception_v4": "inception_v4@128",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_conv_128s@224",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout mambaout_femto",
    "maxxvit": "test_maxvit@160 coatnet_bn_0_rw_224@224 coatnext_nano_rw_224@224",
    "metaformer": "poolformer_s12 poolformerv2_s12 convformer_s18 caformer_s18",
    "mlp_mixer": "gmixer_12_224@224",
    "mobilenetv3": """mobilenetv3_small_050 mobilenetv3_rw tf_mobilenetv3_small_075 tf_mobilenetv3_small_minimal_100
        lcnet_050 fbnetv3_b mobilenetv3_large_150d mobilenetv4_conv_small mobilenetv4_conv_small_035
        mobilenetv4_conv_aa_medium mobilenetv4_conv_blur_medium mobilenetv4_hybrid_medium_075""",
    "mobilevit": "mobilevit_xxs mobilevitv2_050",
    "mobilenetv5": "mobilenetv5_base",
    "nasnet": "nasnetalarge@96",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet nf_regnet_b0 nf_resnet26 nf_seresnet26 nf_ecaresnet26 eca_nfnet_l0 nfnet_l0",
    "pnasnet": "pnasnet5large@96",
    "pvt_v2": "pvt_v2_b0",
    "rdnet": "rdnet_tiny",
    "regnet": """regnetx_002 regnety_002 regnetx_004_tv regnety_008_tv regnetz_005 regnetz_040_h regnetv_040
        regnety_040_sgn""",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m0_9 repvit_m1",
    "res2net": "res2net50_26w_4s res2net50_14w_8s res2net50d res2next50",
    "resnest": "resnest14d resnest26d resnest50d_1s4x24d resnest50d_4s2x40d",
    "resnet": """test_resnet resnet10t resnet14t resnet18 resnet18d resnetblur18 seresnet18 ecaresnext26t_32x4d
        ecaresnet26t resnet26t seresnext26d_32x4d seresnext26t_32x4d resnetaa34d resnet50c resnet50s resnet50_gn
        resnetaa50 resnetblur50d ecaresnet50t seresnetaa50d ecaresnetlight resnetrs50 resnext50d_32x4d
        ecaresnet50d_pruned""",
    "resnetv2": "resnetv2_18 resnetv2_50 resnetv2_50d_gn resnetv2_50d_evos resnetv2_50d_frn resnetv2_50x1_bit",
    "rexnet": "rexnet_100 rexnetr_100",
    "selecsls": "selecsls42 selecsls42b selecsls60",
    "senet": "legacy_seresnet18 legacy_seresnet50 legacy_seresnext26_32x4d",
    "shvit": "shvit_s1@128",
    "sknet": "skresnet18 skresnet50d skresnext50_32x4d",
    "starnet": "starnet_s050 starnet_s1",
    "swiftformer": "swiftformer_xs@224",
    "swin_transformer": "swin_s3_tiny_224@224",
    "tiny_vit": "tiny_vit_5m_224@224",
    "tresnet": "tresnet_m",
    "vgg": "vgg11 vgg11_bn",
    "visformer": "visformer_tiny@224",
    "vision_transformer": "test_vit@160",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224@224",
    "vitamin": "vitamin_small_224@224",
    "vovnet": "ese_vovnet19b_slim_dw ese_vovnet19b_dw vovnet39a eca_vovnet39b ese_vovnet39b_evos",
    "xception": "legacy_xception@96",
    "xception_aligned": "xception41@96 xception41p@96",
}
# what is not in the lists above, and why
LEFT_OUT = {
    "645 million parameters, which in fp64 need more memory than most machines have": "torchvision:regnet_y_128gf",
    "a transformer: no convolution but the patches' embedding; a smaller one of its kind is there": """
        torchvision:swin_b torchvision:swin_s torchvision:swin_v2_b torchvision:swin_v2_s torchvision:vit_b_16
        torchvision:vit_h_14 torchvision:vit_l_16 torchvision:vit_l_32
        beit cait convit crossvit davit deepseek_vit deit eva gcvit gemma4_vit hiera hieradet_sam2 mvitv2 naflexvit nest
        pit qwen3_vit sequencer swin_transformer_v2 swin_transformer_v2_cr tnt twins vision_transformer_relpos
        vision_transformer_sam volo xcit""",
}
TOLERANCE = 1e-6  # of a tensor's largest value, in fp64
# up to this size networks are also compared on the kernels that "auto" takes
KERNELS_PARAMETERS = 1_500_000


@dataclass(frozen=True)
class Model:
    """One network of a library, and the height and width of the images it is asked with."""

    source: str
    family: str
    name: str
    px: int

    @property
    def id(self):
        return f"{self.source}:{self.name}"

    def build(self):
        """With random weights and three classes, in fp64; dropouts and dropped paths where the library has them."""
        torch.manual_seed(0)
        if self.source == "torchvision":
            model = networks.build(self.id, num_classes=3)
        else:
            networks.import_torchvision()
            import timm

            for options in ({"drop_rate": 0.2, "drop_path_rate": 0.1}, {"drop_rate": 0.2}, {}):
                try:
                    model = timm.create_model(self.name, num_classes=3, **options)
                    break
                except TypeError:
                    if not options:
                        raise
        model = model.double().train()
        with torch.no_grad():
            for parameter in model.parameters():  # no branch shall start as zero or as the identity
                if parameter.dim() <= 1 or float(parameter.abs().max()) < 1e-3:
                    offset = 1 if bool((parameter == 1).all()) else 0
                    parameter.normal_(0, 0.2).add_(offset)
        return model


def _models():
    for source, families in (("torchvision", TORCHVISION), ("timm", TIMM)):
        for family, names in families.items():
            for item in names.split():
                name, _, px = item.partition("@")
                yield Model(source, family, name, int(px or 64))


MODELS = {model.id: model for model in _models()}


# comparing


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in values for tensor in _tensors(item)]


def _outputs(value):
    return {f"output {i}": t.detach() for i, t in enumerate(_tensors(value))}


def step(model, images):
    """{name: tensor} of all that a step makes: outputs, gradients, buffers and the next random number."""
    torch.manual_seed(1)
    leaf = images.clone().requires_grad_()
    result = model(leaf)
    outputs = _tensors(result)
    torch.autograd.backward(outputs, [make_grad(t, i) for i, t in enumerate(outputs)])
    found = _outputs(result)
    found["gradient of the images"] = leaf.grad
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    found |= {f"buffer {name}": b.clone() for name, b in model.named_buffers()}
    model.zero_grad()
    return found | {"next random number": torch.rand(1)}


def difference(mine, theirs):
    """The largest difference of a tensor by its largest value, and the tensor's name; values under a thousandth of the
    largest of their kind (a gradient that is zero but for rounding) count as that."""
    assert list(mine) == list(theirs)
    largest = collections.Counter()
    for name, tensor in theirs.items():
        if tensor is not None and tensor.numel():
            kind = name.split()[0]
            largest[kind] = max(largest[kind], float(tensor.abs().max()))
    worst = 0.0, ""
    for name, tensor in theirs.items():
        assert (tensor is None) == (mine[name] is None), f"{name}: {mine[name]} and {tensor}"
        if tensor is None or not tensor.numel():
            continue
        assert mine[name].shape == tensor.shape, f"{name}: {mine[name].shape}, not {tensor.shape}"
        error = float((mine[name] - tensor).abs().max())
        scale = max(float(tensor.abs().max()), 1e-3 * largest[name.split()[0]]) or 1.0
        worst = max(worst, (math.inf if math.isnan(error) else error / scale, name))
    return worst


def check(model):
    """Convert one network and compare it with itself: a step of training, an evaluation, and reverted.

    Returns:
        (stock network, report, {function that a forward calls: whether it was fused}, largest difference)

    Raises:
        AssertionError: it does not agree.
    """
    net = model.build()
    stock = copy.deepcopy(net)
    report = fastcnn.convert(net)
    images = torch.randn(2, 3, model.px, model.px, dtype=torch.float64)
    with fastcnn.backend("torch"):
        expected = step(stock, images)
        differences = [difference(step(net, images), expected)]
        stock.eval(), net.eval()
        with torch.no_grad():
            differences.append(difference(_outputs(net(images)), _outputs(stock(images))))
    functions = {
        module._fastcnn_unit.prefix + fate.name: fate.fused
        for module in net.modules()
        if "_fastcnn_unit" in vars(module)
        for programs in module._fastcnn_unit.programs.values()
        for program in programs
        for fate in program.fates
    }
    fastcnn.revert(net)
    assert [type(m) for m in net.modules()] == [type(m) for m in stock.modules()]
    worst, name = max(differences)
    assert worst <= TOLERANCE, f"{name}: off by {worst:.1e} of its largest value"
    return stock, report, functions, worst


def check_kernels(model):
    """The same on the kernels that "auto" takes: a step in fp64, and in fp32 the outputs and statistics by the error
    rule. (Gradients in fp32 are none of continuous functions: where one value rounds to the other side of a ReLU's
    kink, batch norm of a few pixels makes a large difference of it, in PyTorch's as in ours.)
    """
    net = model.build()
    for module in net.modules():  # they draw other numbers there
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    stock = copy.deepcopy(net)
    fastcnn.convert(net)
    images = torch.randn(2, 3, model.px, model.px, dtype=torch.float64)
    expected = step(stock, images)
    worst, name = difference(step(net, images), expected)
    assert worst <= TOLERANCE, f"{name}: off by {worst:.1e} of its largest value"
    rows = fastcnn.verify(net.float(), images.float()).rows
    rows = [row for row in rows if not row[0].startswith("gradient")]
    wrong = [row[3] for row in rows if row[3] and not row[1] <= 10 * row[2]]
    assert not wrong, "\n".join(wrong[:5])
    ratios = [math.log(mine / theirs) for _, mine, theirs, _ in rows if mine and theirs]
    mean = math.exp(statistics.fmean(ratios)) if ratios else 0.0
    assert mean <= 2, f"errors are {mean:.1f} times PyTorch's in the mean"
