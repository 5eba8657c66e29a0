"""llamaq: QAT → LoRA → DPO → integer codes → ExecuTorch, for Llama 3.2 on Arm phones."""

from llamaq.quiet import quiet_known_messages

__version__ = "0.1.0"

quiet_known_messages()
