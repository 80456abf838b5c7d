"""Peak speed of a GPU's tensor cores by its name, from data sheets: the denominator of MFU.

Model FLOPs utilisation (MFU) is the model FLOP/s of a rank divided by the peak of its device at dense matrix products
in the run's precision (Chowdhery et al. 2022, "PaLM"). Data sheets often print the value with sparsity, twice the dense
one, which no training reaches. A device with another name, a slice of one (MIG) and a CPU have no known peak.
"""

from __future__ import annotations

import re

BF16_TFLOPS: dict[str, float] = {
    r"A[18]00-(SXM4|PCIE)-\d+GB|A[18]00 \d+GB (PCIe|Active)": 312.0,
    r"A10": 125.0,
    r"A10G": 70.0,
    r"A30": 165.0,
    r"A40": 149.7,
    r"RTX A6000": 154.8,
    r"H[18]00( SXM5)?( \d+GB HBM[23]e?)?": 989.0,
    r"H[18]00 PCIe": 756.0,
    r"H[18]00 NVL": 835.0,
    r"H20(-3e)?": 148.0,
    r"H200( SXM)?": 989.0,
    r"H200 NVL": 835.0,
    r"GH200 \d+GB?( HBM3e?)?": 989.0,
    r"B200|B300( SXM6 AC)?": 2250.0,
    r"GB[23]00": 2500.0,
    r"L4": 121.0,
    r"L40": 181.0,
    r"L40S": 362.0,
    r"RTX 6000 Ada Generation": 364.2,
    r"GeForce RTX 3090": 71.0,
    r"GeForce RTX 4090": 165.2,
    r"GeForce RTX 5090": 209.5,
    r"AMD Instinct MI300X( OAM)?": 1307.4,
}
"""Name without "NVIDIA", as a pattern of all of it -> dense bf16 TFLOP/s, sums in fp32.

Data sheets: A100 (NVIDIA 2021), A10 and A30 (2021), A10G (AWS G5, 2021), A40, RTX A6000 and GeForce 30 (GA102
whitepaper, 2021), H100 (2023), H200 (2024), GH200 (2024), L4, L40 and L40S (2023), GeForce 40 (Ada whitepaper, 2023),
B200 and GB200 (Blackwell, 2024: 4.5 and 5 PFLOP/s with sparsity), B300 and GB300 (Blackwell Ultra, 2025: as B200 and
GB200), GeForce 50 (RTX Blackwell whitepaper, 2025), MI300X (AMD, 2023). A800 and H800 differ from A100 and H100 in
their links; H20 is the part for export.
"""

FP16_TFLOPS: dict[str, float] = {
    r"(Tesla )?V100-(SXM[23]|FHHL|DGXS)-\d+GB(-LS)?": 125.0,
    r"(Tesla )?V100-PCIE-\d+GB": 112.0,
    r"(Tesla )?V100S-PCIE-\d+GB": 130.0,
    r"(Tesla )?T4": 65.0,
}
"""The same for devices that compute fp16 alone in tensor cores (V100, V100S and T4 data sheets, 2018 to 2020)."""


def peak_flops(device_name: str, precision: str, *, tf32: bool = False) -> float | None:
    """Return the peak FLOP/s (1/s, not TFLOP/s) of a device at dense matrix products; None = unknown.

    fp16 runs at the speed of bf16, and TF32 at half of it, on every device of the table. Products in fp32 without TF32
    use no tensor cores, so that they have no peak here.

    Args:
        device_name: the name that `torch.cuda.get_device_name` returns.
        precision: bf16, fp16 or fp32.
        tf32: whether products in fp32 are rounded to TF32.
    """
    bf16 = _find(BF16_TFLOPS, device_name)
    match precision:
        case "bf16":
            tflops = bf16
        case "fp16":
            tflops = bf16 if bf16 is not None else _find(FP16_TFLOPS, device_name)
        case _:
            tflops = bf16 / 2 if tf32 and bf16 is not None else None
    return tflops * 1e12 if tflops is not None else None


def _find(table: dict[str, float], device_name: str) -> float | None:
    name = device_name.removeprefix("NVIDIA ")
    return next((tflops for pattern, tflops in table.items() if re.fullmatch(pattern, name)), None)
