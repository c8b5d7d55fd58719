"""The networks and the two stages built of them: an autoencoder of behaviour, and diffusion in its latent space."""
