# Lê o streaming com o HTTP::Tiny, que vem com o Perl, e escreve cada objeto, numa linha, assim que ele chega.
use strict;
use warnings;
use HTTP::Tiny;
use JSON::PP;

$| = 1;
my $json = JSON::PP->new->utf8->allow_nonref->canonical;
my $rest = "";
my $response = HTTP::Tiny->new->post($ARGV[0], {
    content       => "{}",
    data_callback => sub {
        $rest .= $_[0];
        while ($rest =~ s/^(.*?)\n//s) { print $json->encode($json->decode($1)), "\n" }
    },
});
die "HTTP $response->{status}" unless $response->{success};
