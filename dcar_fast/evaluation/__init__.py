"""How good pictures and reconstructions are: reconstruction error, FID, ShapesEval, and image folders for the tools of
MJHQ-30K and GenEval."""
