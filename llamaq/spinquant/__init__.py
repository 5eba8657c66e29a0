"""SpinQuant (https://arxiv.org/abs/2405.16406): rotations that leave a model's function as it is and make its weights
and activations easier to round, then rounding that makes the best of it. No training data is needed, only text to
calibrate on.

    rotations    which there are, where they merge, and the contract that a checkpoint carries
    statistics   one pass over the calibration text: what each linear sees, and how much its errors matter
    learn        rotations by expected quantization noise (default), or as published
    rounding     GPTQ, layer by layer
    polish       scales and norms trained with the codes frozen
"""
