"""SpinQuant (https://arxiv.org/abs/2405.16406): rotate a model so that it rounds well, then round it with care.

A rotation leaves the model's function as it is and spreads outliers over many channels, which makes the steps of the
integer codes smaller. GPTQ then chooses the codes so that each layer's outputs change least. Nothing is trained; all
that is needed is text to calibrate on. In the order of a run:

    windows          the calibration text, cut into windows of tokens, and the text candidates are judged on
    calibrate        one pass over the text: what each linear reads, and how much errors in its output cost
    rotations        R1, R2 and R4, where they merge into the weights, and what a checkpoint says about them
    cayley           orthogonal matrices that an optimizer can move
    expected_noise   learning rotations by the quantization noise to expect (the default)
    end_to_end       learning rotations by the model's own loss, as published, and refining them by KL
    gptq             rounding to integer codes, layer by layer
    polish           training group scales and norm gains with the codes frozen
    candidates       all of this for one set of rotations, and the choice among several
    outliers         how far outliers stand out before and after, for the report
    loops            the progress bar and the learning rate schedule of all loops above
"""
