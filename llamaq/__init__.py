"""llamaq: QAT → LoRA → DPO → integer codes → ExecuTorch, for Llama 3.2 on Arm phones."""

__version__ = "0.1.0"
