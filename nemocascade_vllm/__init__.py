"""Weight transfer and launcher of a vLLM server that generates rollouts for NemoCascade.

Installed beside vLLM (`pip install ./nemocascade_vllm`), it registers itself as a plugin: the
weight transfer `nemocascade`, by NCCL or gloo, and on CPUs the experts without a gate that
Nemotron models have. It needs torch and vLLM only.
"""

from __future__ import annotations

BACKEND = "nemocascade"
"""Name of the weight transfer: `--weight-transfer-config '{"backend": "nemocascade"}'`."""


def register() -> None:
    """Entry point `vllm.general_plugins`; vLLM calls it in each of its processes."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "nemocascade_vllm.transfer", "NemoCascadeTransferEngine"
        )
    if current_platform.is_cpu():
        from nemocascade_vllm.cpu_experts import install

        install()
