"""What becomes of a trained model: run checkpoints, merging, exports, the Hub and its card."""
