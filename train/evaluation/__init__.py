"""How good an encoder is: held-out pairs, k-NN and a linear probe, one file a family of protocols."""
