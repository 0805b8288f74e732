"""The files copied into every exported folder. They import nothing from this project, so that an export stands alone."""
