"""Tiny networks that read maps out of pictures: UperNet for segments, DPT for depth; made, saved and returned."""

import torch


def tiny_upernet(folder):
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    torch.manual_seed(0)
    backbone = ConvNextConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=8, num_labels=5, use_auxiliary_head=False, pool_scales=[1, 2]
    )
    network = UperNetForSemanticSegmentation(config).eval()
    network.save_pretrained(folder)
    return network


def tiny_dpt(folder):
    from transformers import DPTConfig, DPTForDepthEstimation

    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5],
        is_hybrid=False,
        use_auxiliary_head=False,
    )
    network = DPTForDepthEstimation(config).eval()
    network.save_pretrained(folder)
    return network
