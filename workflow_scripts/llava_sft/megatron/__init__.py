"""Megatron-Core set up for this model, and every private or patched name of it and of Transformer Engine: the one door.

The modules of the model itself are built from Megatron's public classes in llava_sft/model.
"""
