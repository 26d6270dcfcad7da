"""What is minimised: equations as pure functions, and the loss module that joins them."""
