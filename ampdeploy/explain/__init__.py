"""Why a pruned model is, or is not, as much faster as its FLOPs say."""
