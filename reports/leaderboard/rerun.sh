#!/usr/bin/env bash
# Every run of this folder again, and a bundle of each: rerun.sh DATA CHECKPOINTS OUT [NAME...]
# DATA: data sets in torchvision's layout; CHECKPOINTS: the public weights that the zoo's cards name; OUT: folder of the
# runs, resumed where they are; NAME: only these. About 2.5 hours of one CPU core for all.
set -euo pipefail
[ $# -ge 3 ] || { sed -n 2,4p "$0"; exit 2; }
data=$(realpath "$1") checkpoints=$(realpath "$2") out=$3
shift 3
robbench=${ROBBENCH:-robbench}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export ROBBENCH_DATA=$data ROBBENCH_CHECKPOINTS=$checkpoints
mkdir -p "$out"

digits=standard,mixup,cutout,r-la,a-la,at,trades,mart,iat,jsa-at,ijsat,trades-jsa,mart-jsa
names=("$@")
wanted() { # NAME: whether it was asked for
    [ ${#names[@]} = 0 ] && return 0
    local name; for name in "${names[@]}"; do [ "$name" = "$1" ] && return 0; done
    return 1
}
attack() { # NAME ARGUMENTS...: the run OUT/NAME and its bundle OUT/NAME.zip
    local name=$1; shift
    wanted "$name" || return 0
    $robbench run "$@" --out "$out/$name"
    rm -f "$out/$name.zip"
    case $name in digits-*steps | digits-epsilon) kept=2 ;; *) kept=6 ;; esac # examples a cell
    $robbench export "$out/$name" -o "$out/$name.zip" --examples $kept
}

attack digits --defense $digits --attacks fgsm,pgd10,pgd20,pgd50,mim,aa,fgsm-l2,pgd10-l2,pgd20-l2,pgd50-l2,aa-l2,pgd20-l1,pgd50-l1,aa-l1,om-pgd,r-la,r-la-l2,r-la-none,a-la,a-la50,a-la-pred,a-la-l2,jsa10,jsa50,jsa50-r5,jsa50-level1,jsa50-level2,jsa50-paper-literal
attack digits-epsilon --defense $digits --attacks pgd20 --epsilon 0.05,0.1,0.15,0.2,0.25,0.3
attack digits-steps --defense $digits --attacks pgd50 --steps 1,2,5,10,20,50,100
attack digits-jsa-steps --defense $digits --attacks jsa50 --steps 1,5,10,20,50,100
unseen=elastic,jpeg-linf,jpeg-l2,jpeg-l1,uar-linf,uar-l2,uar-l1,fog,snow
grid=elastic-1,elastic-2,elastic-3,elastic-4,elastic-5,elastic-6,uar-linf-1,uar-linf-2,uar-linf-3,uar-linf-4,uar-linf-5,uar-linf-6
minimal=deepfool-l2,deepfool-linf,ddn-l2,fmn-l2,fmn-linf,fmn-l1,fmn-l0
attack digits-unforeseen --model digits-standard,digits-at,digits-ijsat --attacks $unseen,$grid
attack digits-minimal --model digits-standard,digits-at,digits-ijsat --attacks cw-l2,$minimal
attack digits-likelihood --model digits-glow,digits-glow-at,digits-glow-hybrid --attacks nll-in,nll-out,noise --epsilon 0,4,8,16,32,64
attack digits-realnvp-likelihood --model digits-realnvp,digits-realnvp-at,digits-realnvp-hybrid --attacks nll-in,noise --epsilon 0,4,8,16,32,64
attack digits-realnvp-steps --model digits-realnvp,digits-realnvp-at,digits-realnvp-hybrid --attacks nll-in,noise --epsilon 32 --steps 10,20,50
attack fashionmnist --dataset fashionmnist --defense standard,at,trades,ijsat --attacks fgsm,pgd10,pgd20,pgd50,mim,pgd20-l2,pgd50-l2,pgd50-l1,om-pgd,r-la,a-la,a-la-l2,jsa10,jsa50,jsa50-level1,jsa50-level2,aa --n 1000 --batch-size 128
fashion=fashionmnist-standard,fashionmnist-at,fashionmnist-at-10k,fashionmnist-ijsat
attack fashionmnist-unforeseen --dataset fashionmnist --model $fashion --attacks $unseen,gabor --n 1000 --batch-size 128
attack fashionmnist-minimal --dataset fashionmnist --model $fashion --attacks $minimal --n 1000 --batch-size 128
# 100 steps in the place of 1,000 in each of C&W's nine searches: 1,000 take half an hour a model
attack fashionmnist-cw --dataset fashionmnist --model $fashion --attacks cw-l2 --steps 100 --n 1000 --batch-size 128
attack fashionmnist-likelihood --dataset fashionmnist --model fashionmnist-glow,fashionmnist-glow-at,fashionmnist-glow-hybrid --attacks nll-in,nll-out,noise --epsilon 0,1,2,4,8 --n 500
attack convex-mnist --dataset mnist --model convex-mnist --attacks pgd20,aa --epsilon 0.1 --n 1000
attack convex-fashionmnist --dataset fashionmnist --model convex-fashionmnist --attacks pgd20,aa --n 1000
attack resnet20-cifar10 --dataset cifar10 --model resnet20-cifar10 --attacks pgd20,aa --n 1000
attack mnist-flow --dataset mnist --model mnist-flow --attacks nll-in --epsilon 0 --n 1000
attack trades-mnist --dataset mnist --model trades-mnist --attacks pgd20,aa --n 120
