# fish completion of migrate(1): options, hosts, processes; then the command's own.

set -g __migrate_config /etc/migrate/config.toml

function __migrate_hosts
    awk '/^\[/ { host = /^\[\[host\]\]/ }
         host && $1 == "name" { gsub(/["\047]/, "", $3); name = $3 }
         host && $1 == "id" { print name "\t" $3 }' $__migrate_config 2>/dev/null
end

function __migrate_ids
    __migrate_hosts | awk -F '\t' '{ print $2 "\t" $1 }'
end

# The words from the command on; none while only options are there.
function __migrate_command
    set -l words (commandline -opc)
    set -e words[1]
    while set -q words[1]
        switch $words[1]
            case '--'
                set -e words[1]
                break
            case '--*'
                set -e words[1]
            case '-*'
                if string match -qr '^-[bBlvD]*[hHEp]$' -- $words[1]
                    set -e words[1]
                end
                set -e words[1]
            case '*'
                break
        end
    end
    set -q words[1]; or return 1
    string join \n -- $words
end

function __migrate_complete_command
    set -l words (__migrate_command) (commandline -ct)
    complete -C (string join ' ' -- (string escape -- $words[1..-2]) $words[-1])
end

set -l options -c migrate -n 'not __migrate_command'
complete -c migrate -f -a '(__migrate_complete_command)'
complete $options -s p -x -a '(__fish_complete_pids)' -d 'process to move'
complete $options -s h -x -a '(__migrate_hosts)' -d 'where to, by name'
complete $options -s H -x -a '(__migrate_ids)' -d 'where to, by number'
complete $options -s v -d 'say what was done'
complete $options -s D -d 'show each step, with its time'
complete $options -s b -d 'run it in the background'
complete $options -s B -d 'run it at background priority'
complete $options -s l -d 'run it here if it cannot be run elsewhere'
complete $options -s E -r -F -d 'execute this file'
complete $options -l check -d 'only tell what is in the way'
complete $options -l help -d 'show the options'
