"""SGLang in the control directory and on lent memory, through its own plugin interface."""
