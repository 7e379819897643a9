"""GPUs as numbers: what the vendor says of them, and the rules of their compute capability.

Rates are the vendor's. Kernels sustain less, for clocks fall under load and memory is refreshed: SUSTAINED holds what
an H100 was measured to reach of them, and is an assumption for every other GPU.
"""

import dataclasses
import functools

import torch

# measured on one H100 SXM: 798 of 989.4 TFLOP/s in a matrix product, 3.0 of 3.35 TB/s in a copy
SUSTAINED = {"arithmetic": 0.807, "bandwidth": 0.895}
# compute capability: KiB of shared memory per SM, per block; threads per SM (CUDA programming guide, table of technical
# specifications). A capability that is missing has the numbers of the next one below
CAPABILITIES = {
    80: (164, 163, 2048),
    86: (100, 99, 1536),
    89: (100, 99, 1536),
    90: (228, 227, 2048),
    100: (228, 227, 2048),
    120: (100, 99, 1536),
}
REGISTERS = 65536  # per SM, of all of them
L2_BYTES_PER_CYCLE = 64  # that one SM can take from L2 (NVIDIA A100 architecture whitepaper)
SHARED_BYTES_PER_CYCLE = 128  # of one SM's shared memory (CUDA programming guide: 32 banks of 4 bytes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the vendor says of a GPU: dense TFLOP/s with fp32 accumulation, TB/s.

    Attributes:
        device: how torch.cuda.get_device_name names it, in part.
        arch: compute capability times ten.
        sms: streaming multiprocessors.
        clock: boost clock in GHz.
        tensor_16: fp16 and bf16 on tensor cores, without sparsity.
        tf32: fp32 operands on tensor cores.
        fp32: outside of tensor cores.
        fp64: outside of tensor cores.
        bandwidth: of its memory.
        l2: from L2 to all SMs together; nobody publishes it: an assumption.
        source: the vendor's document.
    """

    device: str
    arch: int
    sms: int
    clock: float
    tensor_16: float
    tf32: float
    fp32: float
    fp64: float
    bandwidth: float
    l2: float
    source: str

    @property
    def hertz(self):
        """The clock under load."""
        return self.clock * 1e9 * SUSTAINED["arithmetic"]

    @property
    def bytes_per_second(self):
        """Of its memory, sustained."""
        return self.bandwidth * 1e12 * SUSTAINED["bandwidth"]

    @property
    def shared_per_sm(self):
        """Bytes of shared memory."""
        return self._capability[0] * 1024

    @property
    def shared_per_block(self):
        """Bytes of shared memory that one block may have."""
        return self._capability[1] * 1024

    @property
    def threads_per_sm(self):
        """Threads that fit on one SM."""
        return self._capability[2]

    @property
    def _capability(self):
        return CAPABILITIES[max(known for known in CAPABILITIES if known <= max(self.arch, 80))]

    def macs_per_cycle(self, arithmetic):
        """Multiply-adds of one SM in a cycle.

        Args:
            arithmetic: "16-bit", "tf32", "ieee" (fp32) or "fp64".
        """
        tflops = {"16-bit": self.tensor_16, "tf32": self.tf32, "ieee": self.fp32, "fp64": self.fp64}[arithmetic]
        return tflops * 1e3 / 2 / self.sms / self.clock

    def with_sms(self, sms):
        """The same kind of chip with more or fewer SMs."""
        share = sms / self.sms
        rates = {name: getattr(self, name) * share for name in ("tensor_16", "tf32", "fp32", "fp64")}
        return dataclasses.replace(self, sms=sms, **rates)


# the first of a compute capability stands for all others of it
CHIPS = {
    "a100-sxm": Chip(
        *("A100-SXM4-80GB", 80, 108, 1.41, 312, 156, 19.5, 9.7, 2.039, 5.0),
        "NVIDIA A100 Tensor Core GPU datasheet, 80GB SXM",
    ),
    "h100-sxm": Chip(
        *("H100 80GB HBM3", 90, 132, 1.83, 989.4, 494.7, 66.9, 33.5, 3.35, 8.0),
        "NVIDIA H100 Tensor Core GPU architecture, H100 SXM5",
    ),
    "h100-pcie": Chip(
        *("H100 PCIe", 90, 114, 1.62, 756, 378, 51, 25.6, 2.0, 6.0),
        "NVIDIA H100 Tensor Core GPU datasheet, H100 PCIe",
    ),
    "h200": Chip(
        *("H200", 90, 132, 1.83, 989.4, 494.7, 66.9, 33.5, 4.8, 8.0),
        "NVIDIA H200 Tensor Core GPU datasheet, H200 SXM",
    ),
    "b200": Chip(
        *("B200", 100, 148, 1.85, 2250, 1100, 80, 40, 8.0, 12.0),
        "NVIDIA Blackwell architecture technical brief, HGX B200",
    ),
    "l40s": Chip(
        *("L40S", 89, 142, 2.52, 362, 183, 91.6, 1.4, 0.864, 5.0),
        "NVIDIA L40S datasheet",
    ),
    "rtx-4090": Chip(
        *("RTX 4090", 89, 128, 2.52, 165.2, 82.6, 82.6, 1.3, 1.008, 5.0),
        "NVIDIA Ada GPU architecture whitepaper, appendix A",
    ),
    "rtx-3090": Chip(
        *("RTX 3090", 86, 82, 1.695, 71, 35.6, 35.6, 0.56, 0.936, 2.5),
        "NVIDIA Ampere GA102 GPU architecture whitepaper, table 2",
    ),
    "rtx-5090": Chip(
        *("RTX 5090", 120, 170, 2.407, 209.5, 104.8, 104.8, 1.6, 1.792, 6.0),
        "NVIDIA RTX Blackwell GPU architecture whitepaper, table 3",
    ),
}


def of_arch(arch):
    """The chip that stands for a compute capability (times ten): of it, or of the next one below that is known."""
    nearest = max((chip.arch for chip in CHIPS.values() if chip.arch <= arch), default=80)
    return next(chip for chip in CHIPS.values() if chip.arch == nearest)


@functools.cache
def _of_gpu(index):
    properties = torch.cuda.get_device_properties(index)
    arch = 10 * properties.major + properties.minor
    named = [chip for chip in CHIPS.values() if chip.device in properties.name and chip.arch == arch]
    chip = named[0] if named else dataclasses.replace(of_arch(arch), arch=arch)
    return chip if chip.sms == properties.multi_processor_count else chip.with_sms(properties.multi_processor_count)


def chip(device):
    """The Chip that kernels on this device's tensors run on.

    For tensors that are on no GPU it is the target of Triton's driver, which a stand-in may be: kernels are then
    compiled for it. Without one, in Triton's interpreter, it is an H100, which has every kernel.
    """
    if device.type == "cuda":
        return _of_gpu(torch.cuda.current_device() if device.index is None else device.index)
    from triton.runtime.driver import driver

    try:
        arch = driver.active.get_current_target().arch
    except RuntimeError:  # there is no driver
        arch = 90
    return of_arch(arch if isinstance(arch, int) else 90)
