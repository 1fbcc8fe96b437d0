"""Any encoder of transformers' AutoModel as the trunk: style transformers."""
