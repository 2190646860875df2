from kfac_ext.reference.saliency import compensate, obs_saliency, outgoing_saliency
