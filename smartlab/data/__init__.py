"""The data layer: manifest -> reader -> store -> crops, plus the phantoms and public sources."""
