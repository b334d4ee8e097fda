"""LoRA files: whatever their naming, read, checked, described, renamed.

    names.py       the name of a layer in every naming: kohya's, diffusers', the original models'
    recognise.py   what a file is, from its header alone; needs no torch
    reading.py     its tensors, under kohya's names
    programs.py    what other programs accept, as data; needs no torch
    verifying.py   whether a file is what it should be, and who can load it
    inspecting.py  what a file was trained on and with, and a preset to train again from
    converting.py  the same LoRA under another naming

A tensor of a LoRA file belongs to a layer of the base model and has a role there: in kohya's
naming `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight`, the layer up to the first dot,
the role behind it.
"""
