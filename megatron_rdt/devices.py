"""Peak rates, memory and link bandwidths of devices, from data sheets; runs reach less.

The trainer reads the table for utilisation, the planner for memory limits and times.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Rates and sizes of one kind of device.

    Attributes:
        name: name as in PEAK_BF16_FLOPS, or "CPU".
        peak_flops: peak rate of dense bfloat16 matrix products, FLOP/s, without sparsity.
        memory: memory in bytes.
        intra_bandwidth: bandwidth to the other devices of its node, bytes/s in one direction.
        inter_bandwidth: its share of the node's network bandwidth, bytes/s in one direction.
        per_node: devices in a node.
        memory_bandwidth: of its own memory, bytes/s.
    """

    name: str
    peak_flops: float
    memory: float
    intra_bandwidth: float
    inter_bandwidth: float
    per_node: int = 8
    memory_bandwidth: float = 3.35e12

    @property
    def has_float8(self) -> bool:
        """True if it multiplies float8 numbers."""
        return self.name in FLOAT8_DEVICES

    @property
    def is_gpu(self) -> bool:
        """True if its kernels are those of a GPU."""
        return self.name != "CPU"


@dataclass(frozen=True)
class Rates:
    """Rates that a device attains, as opposed to its peaks.

    Attributes:
        products, tf32_products, float32_products: FLOP/s of matrix products by type.
        float8_products: those of float8, where the device has them.
        attention: FLOP/s of attention kernels, causal ones counted as half.
        memory: bytes per second.
        peak: of dense bfloat16 products by its data sheet, FLOP/s; utilisation is measured against it.
    """

    products: float
    tf32_products: float
    float32_products: float
    float8_products: float
    attention: float
    memory: float
    peak: float


def attained_rates(device: Device) -> Rates:
    """Return the rates that a device is taken to attain: the shares of its peaks that an H100 does.

    Those are 600 TFLOP/s in bfloat16 products, 300 in TF32, 50 in float32, 1,000 in float8 (half of its peak, where bfloat16
    has 61 %), 400 in attention, and 2.7 TB/s.
    """
    share = device.peak_flops / 989e12
    memory = 2.7 / 3.35 * device.memory_bandwidth
    products = 600e12 * share, 300e12 * share, 50e12 * share, 1000e12 * share
    return Rates(*products, 400e12 * share, memory, device.peak_flops)


# Dense bfloat16 peak of one device in FLOP/s, from data sheets (without sparsity); of an MI250X, one of its two dies, which
# programs see as a device.
# A device has the rate of the first key whose words are all in its name.
PEAK_BF16_FLOPS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
    "MI250X": 191.5e12,
}

FLOAT8_DEVICES = {"H100", "H200", "B200", "L40S"}

GIB = 2**30
NVLINK3, NVLINK4, NVLINK5, PCIE4 = 300e9, 450e9, 900e9, 32e9
INFINIBAND_200, INFINIBAND_400 = 25e9, 50e9  # one port per device
INFINITY_FABRIC, SLINGSHOT = 50e9, 12.5e9  # one link between dies; two dies share a port of 25 GB/s
# Nominal figures for CPU processes, which have no meaningful peak: for `rdt plan --measure` and small runs.
CPU_FLOPS, CPU_MEMORY, CPU_BANDWIDTH = 1e11, 8 * GIB, 10e9

# Choices of `rdt plan --device`. Memory is what the driver leaves to programs.
DEVICES = {
    "h100": Device("H100", PEAK_BF16_FLOPS["H100"], 79.1 * GIB, NVLINK4, INFINIBAND_400),
    "h200": Device("H200", PEAK_BF16_FLOPS["H200"], 139.8 * GIB, NVLINK4, INFINIBAND_400, memory_bandwidth=4.8e12),
    "b200": Device("B200", PEAK_BF16_FLOPS["B200"], 178.3 * GIB, NVLINK5, INFINIBAND_400, memory_bandwidth=8e12),
    "a100": Device("A100", PEAK_BF16_FLOPS["A100"], 79.1 * GIB, NVLINK3, INFINIBAND_200, memory_bandwidth=2.04e12),
    "l40s": Device("L40S", PEAK_BF16_FLOPS["L40S"], 44.3 * GIB, PCIE4, INFINIBAND_200, memory_bandwidth=0.864e12),
    "cpu": Device("CPU", CPU_FLOPS, CPU_MEMORY, CPU_BANDWIDTH, CPU_BANDWIDTH / 10, 2, 2 * CPU_BANDWIDTH),
    "mi250x": Device("MI250X", PEAK_BF16_FLOPS["MI250X"], 64 * GIB, INFINITY_FABRIC, SLINGSHOT, 8, 1.6e12),
}
