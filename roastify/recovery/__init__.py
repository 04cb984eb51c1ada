"""Recovery: bringing a converted pretrained model's outputs back to the dense model's."""
