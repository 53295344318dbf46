"""Other programs, each imported when it is asked for; `import timm_resize` needs none of them."""
